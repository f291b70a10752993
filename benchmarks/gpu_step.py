"""A whole training step with and without PRe: `python -m benchmarks.gpu_step --out FILE`.

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
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_cases import Session
from benchmarks.gpu_report import write_json
from benchmarks.gpu_run import make_parser, parse_device, run_until_stopped
from benchmarks.gpu_step_measure import Trainer, head_bytes, run_setting, setting_name
from benchmarks.gpu_step_models import (
    FULL,
    TINY,
    build_model,
    make_batch,
    set_checkpointing,
)
from benchmarks.gpu_step_report import step_bars, step_table
from benchmarks.gpu_step_variants import Regularizer, check_gradients
from benchmarks.gpu_timing import Effort, make_clock
from prereg_kernels._util.machine import describe_machine

SECONDS = 420.0  # for everything; building, checking and warming up take about 60 of them
SETTLE = 60.0
LEAST_ROUNDS, MOST_ROUNDS = 8, 40
TINY_EFFORT = Effort(2, 2, 0.0)


class Benchmark:
    """A run: its results so far, and the file they are kept in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        device = torch.device(options.device)
        self.session = Session(make_clock(device), self.began + options.seconds)
        self.recipe = (TINY if options.size == "tiny" else FULL)[options.model]
        self.results: dict[str, Any] = {
            "machine": describe_machine(device, options.commit) | {"transformers": _transformers()},
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
            "options": {key: str(value) for key, value in vars(options).items()},
            "complete": False,
            "model": {},
            "head_bytes": {},
            "check": {},
            "settings": [],
            "bars": [],
            "problems": self.session.problems,
        }

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

    def save(self, complete: bool = False) -> None:
        self.results["settings"] = [s for s in self.results["settings"] if s]
        self.results |= {
            "complete": complete,
            "seconds": time.monotonic() - self.began,
            "bars": step_bars(self.results),
        }
        write_json(self.results, self.options.out)


def _transformers() -> str:
    import transformers

    return str(transformers.__version__)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, SECONDS)
    parser.add_argument("--model", choices=tuple(FULL), default="llava")
    return parse_device(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and say by the exit code whether ours worked."""
    benchmark = Benchmark(parse(arguments))
    complete = run_until_stopped(benchmark.run, benchmark.session.problems)
    benchmark.save(complete)
    print(step_table(benchmark.results))
    return int(benchmark.session.ours_failed or not complete)


if __name__ == "__main__":
    sys.exit(main())
