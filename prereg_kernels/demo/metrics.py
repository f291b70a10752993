# SPDX-License-Identifier: Apache-2.0
"""Per-step metrics: a JSON line a step, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prereg_kernels._util.files import naming, printable, write_whole

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dict a step: "step" (from 1), "stage", "lm_loss", "pre_loss" (where
    PRe is on), "lr", "grad_norm", "seconds"."""
    path = Path(run_dir) / METRICS_FILE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)}: expected a JSON value a line: {error}") from None


class MetricsLog:
    """Writes the metrics of a run that has done `step` steps, dropping what an interrupted run
    wrote after its last checkpoint, so that a step is never there twice and never missing."""

    def __init__(self, run_dir: Path, step: int, *, tensorboard: bool) -> None:
        self._path = path = run_dir / METRICS_FILE
        kept: list[str] = []
        if step > 0 and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                # A line cut short by a crash is later than the checkpoint: lines are flushed first.
                if len(kept) == step:
                    break
                kept.append(line + "\n")
        write_whole(path, "".join(kept))
        self._file = path.open("a", buffering=1, encoding="utf-8")  # others watch it grow
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one step's metrics."""
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Put everything on the disk: a checkpoint is about to rely on it."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()


class ProgressBar:
    """A progress bar with both losses; silent where `shown` is False."""

    def __init__(self, title: str, step: int, steps: int, *, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
            disable=not shown,
        )
        name = escape(printable(title))
        self._task = self._progress.add_task(name, total=steps, completed=step, losses="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show that `step` steps are done."""
        losses = f"LM {values['lm_loss']:.3f}"
        if "pre_loss" in values:
            losses += f"  PRe {values['pre_loss']:+.3f}"
        self._progress.update(self._task, completed=step, losses=losses)
