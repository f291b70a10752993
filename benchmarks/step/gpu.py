# SPDX-License-Identifier: Apache-2.0
"""A whole training step with and without PRe: `python -m benchmarks.step.gpu --out FILE`.

One model (`--model llava` or `qwen`), random weights, gradient checkpointing off and on; in each
setting the step without PRe, naive PRe, eager PRe on hooks and `apply_pre`, interleaved. The bars
are the step time and the peak memory that `apply_pre` adds. The file is written after every
setting, whole. The exit code is 1 if ours failed or the run was cut short.

`--size tiny` runs the same code where there is no GPU, on models of no importance; memory is then
null in the file, as only a GPU's allocator knows the peak of one step.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.common.program import Program, make_parser, parse_device
from benchmarks.common.report import Json
from benchmarks.common.timing import Effort, make_clock
from benchmarks.step.measure import Trainer, head_bytes, run_setting, setting_name
from benchmarks.step.models import (
    FULL,
    TINY,
    build_model,
    make_batch,
    set_checkpointing,
)
from benchmarks.step.report import step_bars, step_table
from benchmarks.step.variants import Regularizer, check_gradients

SECONDS = 420.0  # for everything; building, checking and warming up take about 60 of them
SETTLE = 60.0
LEAST_ROUNDS, MOST_ROUNDS = 8, 40
TINY_EFFORT = Effort(2, 2, 0.0)


class StepBenchmark(Program):
    """A model, and the variants of its step in every setting."""

    def __init__(self, options: argparse.Namespace) -> None:
        empty: Json = {"model": {}, "head_bytes": {}, "check": {}, "settings": [], "bars": []}
        allocator = os.environ.get("PYTORCH_ALLOC_CONF")
        clock = make_clock(torch.device(options.device))
        super().__init__(options, clock, allocator=allocator, **empty)
        self.results["machine"]["transformers"] = version("transformers")
        self.recipe = (TINY if options.size == "tiny" else FULL)[options.model]

    def run(self) -> None:
        """The gradients first; then the settings, if they are right."""
        self.session.attempt("gradients", self.check)
        if self.session.ours_failed:
            return
        model = build_model(self.recipe.config(), self.session.device)
        trainer = Trainer(self.session, self.recipe, model, Regularizer.of(model))
        self.results["head_bytes"] = head_bytes(trainer.regularizer, model)
        self.results["model"] = {
            "name": self.recipe.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "layer": trainer.regularizer.layer,
            "attention": model.config._attn_implementation,
        }
        for left, checkpointing in ((2, False), (1, True)):
            record: dict[str, Any] = {}
            self.results["settings"].append(record)
            effort = self.effort(left)
            action = partial(run_setting, trainer, checkpointing, effort, record)
            self.session.attempt(setting_name(checkpointing), action)
            trainer.forget()
            self.save()

    def check(self) -> None:
        """The gradients of the tiny model of the same family, on this device and in bfloat16."""
        recipe, device = TINY[self.options.model], self.session.device
        config = recipe.config()
        model = build_model(config, device)
        batch = make_batch(recipe, config, recipe.batch, device)
        for checkpointing in (False, True):
            set_checkpointing(model, checkpointing)
            self.results["check"][setting_name(checkpointing)] = check_gradients(model, batch)

    def effort(self, settings_left: int) -> Effort:
        """Rounds for a share of the time that is left."""
        if self.options.size == "tiny":
            return TINY_EFFORT
        seconds = (self.session.remaining() - SETTLE) / settings_left
        return Effort(LEAST_ROUNDS, MOST_ROUNDS, max(seconds, 0.0))

    def conclusions(self) -> Json:
        settings = [setting for setting in self.results["settings"] if setting]
        return {"settings": settings, "bars": step_bars({"settings": settings})}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, SECONDS)
    parser.add_argument("--model", choices=tuple(FULL), default="llava")
    return parse_device(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and say by the exit code whether ours worked."""
    benchmark = StepBenchmark(parse(arguments))
    complete = benchmark.run_and_save()
    print(step_table(benchmark.results))
    return int(benchmark.session.ours_failed or not complete)


if __name__ == "__main__":
    sys.exit(main())
