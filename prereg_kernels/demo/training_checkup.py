# SPDX-License-Identifier: Apache-2.0
"""Checkups during training: how answers and probes move, every so many steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

from prereg_kernels._util.files import naming, write_whole
from prereg_kernels.demo.config import RunConfig
from prereg_kernels.demo.data.packing import Packer
from prereg_kernels.demo.evaluation import evaluate
from prereg_kernels.demo.measure import measure

CHECKUPS_FILE = "checkups.jsonl"


def training_checkup(
    model: LlavaForConditionalGeneration, packer: Packer, config: RunConfig
) -> dict[str, Any]:
    """Answers, probes and patch structure of a model in training, as the experiment measures them
    after it, on `config.checkup_scenes` scenes. Nothing random, and the model is left as it was.

    Returns:
        "accuracy", "mean_accuracy", "lm_loss" of `evaluate` and the groups of `measure`: probes and
        the demo's part of the table of measures.
    """
    was_training = model.training
    model.eval()
    test = config.scenes.open("test", config.seed)
    train = config.scenes.open("train", config.seed)
    count = config.checkup_scenes
    answers = evaluate(model, packer, test, list(config.families), n_scenes=count)
    measures = measure(model, train, test, train_scenes=count, test_scenes=count)
    model.train(was_training)
    return {
        "accuracy": answers.accuracy,
        "mean_accuracy": answers.mean_accuracy,
        "lm_loss": answers.lm_loss,
        **measures,
    }


def read_checkups(run_dir: Path) -> list[dict[str, Any]]:
    """The checkups of a run, one dict each, "step" among its keys; none where none was made."""
    path = run_dir / CHECKUPS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class CheckupLog:
    """Writes the checkups of a run that has done `step` steps, a line each, dropping what an
    interrupted run wrote after its last checkpoint."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self._path = run_dir / CHECKUPS_FILE
        lines = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                # a line cut short by a crash is later than the checkpoint: lines are flushed first
                try:
                    before = json.loads(line)["step"] <= step
                except (ValueError, TypeError, KeyError):
                    before = False
                lines += [line] if before else []
            write_whole(self._path, "".join(f"{line}\n" for line in lines))
        self._file: Any = None

    def write(self, step: int, checkup: dict[str, Any]) -> None:
        """Append one checkup."""
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **checkup}) + "\n")

    def flush(self) -> None:
        """Put everything on the disk: a checkpoint is about to rely on it."""
        if self._file is not None:
            with naming(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._file is not None:
            self._file.close()
