# SPDX-License-Identifier: Apache-2.0
"""What it costs to watch the gradients of L_LM and L_PRe (`watch_steps`) while a model trains.

    python -m benchmarks.studies.watched_gradients            # three minutes
    python -m benchmarks.studies.watched_gradients --table    # prints what is there

The run is that of `make train-example`, and watches every second step, so that each watched step
has a neighbour of the same weights without. A pair's difference is what watching takes. Writes
benchmarks/results/watched_gradients.json.

Prediction, before the first run: a watched step does two thirds of the tap's matmuls once more,
and PRe is about 3% of such a step, so it takes 2% longer; every 50 steps, that is 0.04% of the run.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.common.report import RESULTS, made_on
from benchmarks.common.study import run_study
from prereg_kernels.train.assemble import assemble
from prereg_kernels.train.config import load_config
from prereg_kernels.train.run import WATCH_STEPS, train
from prereg_kernels.train.trainer import RecipeTrainer

OUT = RESULTS / "watched_gradients.json"
STEPS, WARMUP, EVERY = 610, 10, 2
EXAMPLE = Path("examples/photographs.yaml")


class StepTimes(TrainerCallback):
    """Seconds of each step, from the begin of it to that of the next one.

    Attributes:
        steps: (whether it was watched, seconds), in their order.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[bool, float]] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        now, done = time.perf_counter(), state.global_step
        if done:
            self.steps.append((done == 1 or done % EVERY == 0, now - self._start))
        self._start = now


def prepare(folder: Path) -> None:
    """The example's data and model."""
    subprocess.run([sys.executable, "examples/photographs.py", str(folder)], check=True)
    assemble(str(folder / "clip"), str(folder / "llama"), folder / "llava")


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Medians, in seconds, of one run."""
    prepare(folder)
    times, make = StepTimes(), RecipeTrainer.__init__

    def also(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(times)

    flags = [
        "--model", str(folder / "llava"), "--out", str(folder / "out"),
        "--data.0.path", str(folder / "train.json"), "--data.0.images", str(folder / "images"),
        "--pre.watch_steps", str(EVERY), "--stages.1.max_steps", str(steps),
        "--trainer.save_steps", "9999",
    ]  # fmt: skip
    config = load_config(EXAMPLE, flags)
    RecipeTrainer.__init__ = also  # type: ignore[method-assign]
    try:
        train(replace(config, stages=config.stages[1:]))
    finally:
        RecipeTrainer.__init__ = make  # type: ignore[method-assign]
    return summary(times.steps[WARMUP:])


def summary(steps: list[tuple[bool, float]]) -> dict[str, Any]:
    """Of steps that are watched and not, in turn."""
    pairs = [
        (first[1], second[1]) if second[0] else (second[1], first[1])
        for first, second in zip(steps[::2], steps[1::2], strict=False)
    ]
    plain = statistics.median(without for without, _ in pairs)
    differences = sorted(watched - without for without, watched in pairs)
    added, count = statistics.median(differences), len(differences)
    # Of a median, whatever the differences' distribution: by how many lie below it
    outside = max(0, int((count - 1.96 * math.sqrt(count)) / 2) - 1)
    return {
        "pairs": len(pairs),
        "step_seconds": plain,
        "added_seconds": added,
        "added_interval": [differences[outside], differences[-1 - outside]],
        "of_a_watched_step": added / plain,
        "of_the_run": added / plain / WATCH_STEPS,
    }


def table(results: dict[str, Any]) -> str:
    """A line for people."""
    r = results["measured"]
    low, high = (1e3 * seconds for seconds in r["added_interval"])
    return (
        f"a step takes {1e3 * r['step_seconds']:.1f} ms, and {1e3 * r['added_seconds']:+.2f} ms "
        f"({r['of_a_watched_step']:+.1%}; 95%: {low:+.2f} to {high:+.2f} ms) where it is watched: "
        f"{r['of_the_run']:+.3%} of a run that watches every {WATCH_STEPS} steps "
        f"(medians of {r['pairs']} pairs)\n"
        f"{made_on(results['machine'])}"
    )


if __name__ == "__main__":
    run_study(__doc__, measure, table, OUT, steps=STEPS)
