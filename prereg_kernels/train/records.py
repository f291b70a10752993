# SPDX-License-Identifier: Apache-2.0
"""What a run writes down beside its model: figures, and the samples that it could not use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable, write_whole

METRICS = "metrics.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
NON_FINITE_STEPS = "non_finite.jsonl"
COUNTS = "bad_samples.json"  # in a checkpoint
PERIOD = 1000
"""Samples between two looks at how many were bad."""


class Metrics:
    """metrics.jsonl: a line a log, with its stage and step.

    Args:
        stage, step: where the run goes on. Lines of later steps, as an interrupted run has left,
            go.
        name: of another such file.
    """

    def __init__(self, folder: Path, stage: str, step: int, name: str = METRICS) -> None:
        self._path, self._stage = folder / name, stage
        _cut(self._path, stage, step)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Append a line."""
        line = json.dumps({"stage": self._stage, "step": step, **figures})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def has_logged(path: Path) -> bool:
    """Whether such a file has a line of a step, or one that a crash has cut short. What is measured
    before the first step is of none."""
    if not path.exists():
        return False
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            return True
        if entry.get("step", 0):
            return True
    return False


def _cut(path: Path, stage: str, step: int) -> None:
    """Leave out what a stage wrote after a step, and what a crash has cut short."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("stage") != stage or entry.get("step", 0) <= step:
                kept.append(line + "\n")
    write_whole(path, "".join(kept))


class TooManyBadSamplesError(ValueError):
    """More samples were bad than the settings allow."""


class BadSamples:
    """bad_samples.jsonl, and whether the run may go on.

    Attributes:
        seen: samples of the stage, on all ranks.
        bad: those that were left out.
        step: up to which they are counted.
    """

    def __init__(self, folder: Path, most: float, stage: str) -> None:
        self._path, self._most, self._stage = folder / BAD_SAMPLES, most, stage
        self.seen = self.bad = self.step = 0

    def go_on(self, step: int, checkpoint: str | Path | None, *, is_writing: bool) -> None:
        """As the run was at this step, of which a checkpoint was saved; None: at its start."""
        if is_writing and self._path.exists():
            _cut(self._path, self._stage, step)
        counted = Path(checkpoint) / COUNTS if checkpoint is not None else None
        if counted is not None and counted.exists():
            counts = json.loads(counted.read_text())
            self.seen, self.bad, self.step = counts["seen"], counts["bad"], step

    def save(self, checkpoint: Path) -> None:
        """Write the counts into a checkpoint."""
        write_whole(checkpoint / COUNTS, json.dumps({"seen": self.seen, "bad": self.bad}) + "\n")

    def add(
        self, step: int, seen: int, bad: Sequence[tuple[str, str]], *, is_writing: bool
    ) -> None:
        """What all ranks have seen since the last time.

        Raises:
            TooManyBadSamplesError: more were bad than may be.
        """
        self.seen, self.bad, self.step = self.seen + seen, self.bad + len(bad), step
        if is_writing and bad:
            with self._path.open("a", encoding="utf-8") as file:
                for where, reason in bad:
                    line = {"stage": self._stage, "step": step, "where": where, "reason": reason}
                    file.write(json.dumps(line) + "\n")
        is_count = isinstance(self._most, int)
        allowed = self._most if is_count else max(1, int(self._most * self.seen))
        if self.bad > allowed:
            examples = "; ".join(f"{where}: {reason}" for where, reason in bad[:3])
            raise TooManyBadSamplesError(
                f"max_bad: {self.bad} of {self.seen} samples could not be used, and {allowed} may; "
                f"{printable(self._path)} names them; {printable(examples)}"
            )
