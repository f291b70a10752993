# SPDX-License-Identifier: Apache-2.0
"""Training curves, eager against fused: `python -m benchmarks.studies.curves --out FILE`.

A LLaVA of 53 million parameters learns to answer questions about digit scenes, 1,000 steps with
PRe, in bfloat16 autocast. Four runs from the same weights, on the same batches, step by step:
eager PRe; eager in two micro-batches of half the size; eager with each batch's samples in reverse;
and `apply_pre`. The first three are the same computation summed in another order, so their
distances are the noise that a training run has anyway; the fused run may be as far from them.
The exit code is 1 if it is farther, or the run was cut short.

`--size tiny` runs the same code on the CPU, on a model of no importance.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.program import Program, make_parser, parse_device
from benchmarks.common.report import Json, bar, bar_lines
from benchmarks.common.timing import CpuClock
from benchmarks.step.models import Batch
from benchmarks.step.variants import hooked_terms
from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.demo.data.packing import Packer, TrainStream, build_tokenizer
from prereg_kernels.demo.data.questions import COMMON_FAMILIES
from prereg_kernels.demo.data.scenes import SceneConfig
from prereg_kernels.demo.model.llava import ModelConfig, build_model
from prereg_kernels.demo.schedule import cosine_with_warmup

Split = Callable[[Batch], list[Batch]]
Step = Callable[[Batch], tuple[float, float]]

SECONDS = 420.0
BOUND = 1.5  # times the largest distance between two eager runs; set before the first run
FUSED = "fused"
CURVES = ("lm_loss", "pre_loss")


@dataclass(frozen=True)
class Plan:
    """What is trained, how long, and over how many steps its curves are smoothed."""

    model: ModelConfig
    steps: int
    window: int
    batch: int
    questions: int
    layer: int
    lr: float = 3e-4
    warmup: int = 50
    weight: float = 0.5
    clip: float = 1.0


FULL = Plan(
    ModelConfig(
        width=640, tower_layers=4, decoder_layers=8, heads=10, tower_mlp=1280, decoder_mlp=1728,
        initializer_range=0.04,
    ),
    steps=1000, window=50, batch=64, questions=12, layer=4,
)  # fmt: skip
TINY = Plan(
    ModelConfig(width=32, tower_layers=1, decoder_layers=2, heads=2, tower_mlp=32, decoder_mlp=32),
    steps=8, window=3, batch=4, questions=3, layer=1, warmup=2,
)  # fmt: skip


def whole(batch: Batch) -> list[Batch]:
    return [batch]


def halves(batch: Batch) -> list[Batch]:
    middle = len(batch["input_ids"]) // 2
    parts = slice(None, middle), slice(middle, None)
    return [{name: x[part] for name, x in batch.items()} for part in parts]


def backwards(batch: Batch) -> list[Batch]:
    return [{name: x.flip(0) for name, x in batch.items()}]


EAGER: dict[str, Split] = {"eager": whole, "eager, halves": halves, "eager, reversed": backwards}


class Runs:
    """The four runs of a plan, from the same weights."""

    def __init__(self, plan: Plan, device: torch.device, seed: int = 0) -> None:
        self.plan, self.device, self.number = plan, device, 0
        scenes = SceneConfig()
        tokenizer = build_tokenizer(scenes)
        families = dict.fromkeys(COMMON_FAMILIES, 1.0)
        packer = Packer(tokenizer, scenes.patches)
        self.stream = TrainStream(
            scenes.open("train", seed), packer, families, plan.questions, plan.batch
        )
        self.steps: dict[str, Step] = {}
        for name in (*EAGER, FUSED):
            model = build_model(plan.model, scenes, tokenizer, seed).train().to(device)
            self.parameters = sum(p.numel() for p in model.parameters())
            make = self._fused if name == FUSED else self._eager
            self.steps[name] = make(model, EAGER.get(name, whole))

    def step(self, number: int) -> dict[str, tuple[float, float]]:
        """(L_LM, L_PRe) of every run at this step, counted from 0."""
        (micro_batch,) = self.stream.micro_batches(number)
        batch = {name: x.to(self.device) for name, x in micro_batch.items()}
        self.number = number
        return {name: step(batch) for name, step in self.steps.items()}

    def _eager(self, model: Any, split: Split) -> Step:
        layer, weight = self.plan.layer, self.plan.weight
        head = apply_pre(model, layers=layer).heads[layer]
        remove_pre(model)
        terms, _ = hooked_terms(model, layer, head)
        update = self._updater([*model.parameters(), *head.parameters()])

        def step(batch: Batch) -> tuple[float, float]:
            sums = torch.zeros(2, device=self.device)
            for part in split(batch):
                # every sample has as many labels, and as many visual tokens, as any other
                share = len(part["input_ids"]) / len(batch["input_ids"])
                with self._autocast():
                    lm_loss, pre_loss = terms(part)
                (share * (lm_loss + weight * pre_loss)).backward()
                sums += share * torch.stack((lm_loss, pre_loss)).detach()
            update()
            lm, pre = sums.tolist()
            return lm, pre

        return step

    def _fused(self, model: Any, split: Split) -> Step:
        pre = apply_pre(model, layers=self.plan.layer, weight=self.plan.weight)
        update = self._updater(list(model.parameters()))

        def step(batch: Batch) -> tuple[float, float]:
            (part,) = split(batch)
            with self._autocast():
                loss = model(**part).loss
            loss.backward()
            update()
            metrics = pre.metrics()
            return metrics["lm_loss"], metrics["pre_loss"]

        return step

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _updater(self, parameters: list[Tensor]) -> Callable[[], None]:
        plan = self.plan
        optimizer = torch.optim.AdamW(parameters, lr=plan.lr, betas=(0.9, 0.98), fused=True)

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, plan.clip)
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * cosine_with_warmup(self.number, plan.steps, plan.warmup)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return update


def smooth(curve: Sequence[float], window: int) -> np.ndarray:
    """Moving means over `window` steps, where they are complete."""
    return np.convolve(curve, np.ones(window) / window, mode="valid")


def distances(curves: Mapping[str, Sequence[float]], window: int) -> Json:
    """Between smoothed curves: {"max", "rms": {"noise", "fused", "ratio"}}.

    noise: the largest distance between two eager runs. fused: the median, over the eager runs, of
    the distance from fused to it.
    """
    smoothed = {name: smooth(curve, window) for name, curve in curves.items()}
    found: Json = {}
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "max": lambda x: float(np.abs(x).max()),
        "rms": lambda x: math.sqrt(float(np.square(x).mean())),
    }
    for name, measure in measures.items():
        pairs = itertools.combinations(EAGER, 2)
        noise = max(measure(smoothed[a] - smoothed[b]) for a, b in pairs)
        fused = statistics.median(measure(smoothed[FUSED] - smoothed[a]) for a in EAGER)
        ratio = fused / noise if noise else math.inf if fused else 0.0
        found[name] = {"noise": noise, "fused": fused, "ratio": ratio}
    return found


class CurvesBenchmark(Program):
    """The runs, step by step, so that they are equally long whenever the time is over."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.plan = TINY if options.size == "tiny" else FULL
        super().__init__(
            options,
            CpuClock(),  # nothing is timed
            bound=BOUND,
            window=self.plan.window,
            parameters=None,
            curves={curve: {name: [] for name in (*EAGER, FUSED)} for curve in CURVES},
            distances={},
            bars=[],
        )

    def run(self) -> None:
        runs = Runs(self.plan, torch.device(self.options.device))
        self.results["parameters"] = runs.parameters
        for number in range(self.plan.steps):
            if self.session.remaining() < 0:
                self.session.problems.append(f"no time left after {number} steps")
                return
            for name, values in runs.step(number).items():
                for curve, value in zip(CURVES, values, strict=True):
                    self.results["curves"][curve][name].append(value)

    def conclusions(self) -> Json:
        curves, plan = self.results["curves"], self.plan
        steps = min(len(values) for curve in CURVES for values in curves[curve].values())
        curves = {c: {name: v[:steps] for name, v in curves[c].items()} for c in CURVES}
        enough = steps >= plan.window
        found = {c: distances(curves[c], plan.window) for c in CURVES} if enough else {}
        return {
            "complete": self.results["complete"] and steps == plan.steps,
            "steps": steps,
            "curves": curves,
            "distances": found,
            "bars": [
                bar(f"{c}, {kind} difference / noise", BOUND, 1.0, value["ratio"], False, "")
                for c, kinds in found.items()
                for kind, value in kinds.items()
            ],
        }


def table(results: Json) -> str:
    """Where the runs ended, how far apart they were, and the bars."""
    lines = [
        f"{results['machine']['device']}; {results['parameters']} parameters, "
        f"{results['steps']} steps; {results['seconds']:.0f} s"
    ]
    for curve, runs in results["curves"].items():
        ends = (
            f"{name} {statistics.mean(values[-results['window'] :]):.4f}"
            for name, values in runs.items()
            if values
        )
        lines.append(f"{curve} at the end: {', '.join(ends)}")
    for curve, kinds in results["distances"].items():
        for kind, found in kinds.items():
            lines.append(
                f"{curve}, {kind} difference of smoothed curves: eager from eager "
                f"{found['noise']:.2e}, fused from eager {found['fused']:.2e}"
            )
    lines += [f"problem: {problem}" for problem in results["problems"]]
    return "\n".join([*lines, "", *bar_lines(results["bars"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and say by the exit code whether the fused run is within the noise."""
    benchmark = CurvesBenchmark(parse_device(make_parser(__doc__, SECONDS), arguments))
    benchmark.run_and_save()
    results = benchmark.results
    print(table(results))
    return int(not results["complete"] or not all(found["met"] for found in results["bars"]))


if __name__ == "__main__":
    sys.exit(main())
