# SPDX-License-Identifier: Apache-2.0
"""The error rule at full size: `python -m benchmarks.loss.accuracy --out FILE`.

N = 18,432 visual tokens, D = A = M = 4096, in bfloat16 and float16: the errors of eager PRe, of the
fused loss and of the tap against float64 truth, for the loss, dh and every dW and db, over several
draws. Truth is computed in slices of rows, so that it fits beside the rest. The rule is the tests':
an error is at most eager's in the same dtype, plus 1e-6; what exceeds it must be luck, that is,
within five standard errors of the mean over the draws. The exit code is 1 if the rule is broken.

`--size tiny` runs the same code on the CPU, on problems of no importance.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.program import Program, make_parser, parse_device
from benchmarks.common.report import Json
from benchmarks.common.timing import CpuClock
from benchmarks.loss import cases
from benchmarks.loss.cases import Case
from benchmarks.loss.checks import as_problem
from prereg_kernels import eager_pre_loss, fused_pre_loss
from tests.helpers import SLACK, Problem, assert_not_above, relative_error, run, run_tap

SECONDS = 240.0
DRAWS = 8
SLICE_ROWS = 4096
# float16 has gradients of 1/N only with a scaler's factor, here the usual first one
DTYPES = {torch.bfloat16: 1.0, torch.float16: 2.0**16}
VARIANTS = {"fused": partial(run, fused_pre_loss), "tap": run_tap}


def truth_in_slices(problem: Problem, factor: float, rows: int) -> dict[str, Tensor]:
    """What `run_truth` gives for a problem with a `visual_index`, in slices of so many rows."""
    index = problem.options["visual_index"]
    weights = [w.double().requires_grad_() for w in problem.weights]
    biases = [None if b is None else b.double().requires_grad_() for b in problem.biases or []]
    loss = torch.zeros((), dtype=torch.float64, device=index.device)
    dhidden = torch.zeros_like(problem.hidden, dtype=torch.float64)
    for part in index.split(rows):
        h = problem.hidden[part].double().requires_grad_()
        anchor = problem.anchor[part].double()
        value = eager_pre_loss(h, anchor, weights, biases or None, denominator=len(index))
        (factor * value).backward()
        loss += value.detach()
        dhidden[part] = h.grad
    truth = {"loss": loss, "dhidden": dhidden}
    truth |= {f"dW{layer}": w.grad for layer, w in enumerate(weights)}
    return truth | {f"db{layer}": b.grad for layer, b in enumerate(biases) if b is not None}


def measure(
    case: Case, factor: float, device: torch.device, draws: int, rows: int
) -> dict[str, dict[str, list[float]]]:
    """{"eager", "fused", "tap": {result: its error in each draw}}."""
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in range(draws):
        problem = as_problem(cases.make_tensors(case, device, seed))
        truth = truth_in_slices(problem, factor, rows)
        runs = {"eager": partial(run, eager_pre_loss)} | VARIANTS
        for name, function in runs.items():
            results = function(problem, factor)
            for key, true in truth.items():
                error = relative_error(results[key], true)
                errors.setdefault(name, {}).setdefault(key, []).append(error)
    return errors


def judge(errors: dict[str, dict[str, list[float]]]) -> Json:
    """{variant: {result: mean error, eager's, their ratio, and whether the rule holds}}."""
    found: Json = {}
    for name in VARIANTS:
        found[name] = {}
        for key, eager in errors["eager"].items():
            ours = errors[name][key]
            excess = [
                {key: error - bound - SLACK} for error, bound in zip(ours, eager, strict=True)
            ]
            broken = None
            try:
                assert_not_above(excess, [key])
            except AssertionError as error:
                broken = str(error)
            mean, bound = statistics.mean(ours), statistics.mean(eager)
            found[name][key] = {
                "error": mean,
                "eager": bound,
                "ratio": mean / bound if bound else None,
                "met": broken is None,
                "broken": broken,
            }
    return found


class AccuracyBenchmark(Program):
    """Both dtypes; nothing is timed, and a buffer to time with would only take memory."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, CpuClock(), cases=[])
        self.device = torch.device(options.device)

    def run(self) -> None:
        for dtype, factor in DTYPES.items():
            case = replace(cases.LLAVA, dtype=dtype, weight_dtype=dtype)
            case = cases.tiny(case) if self.options.size == "tiny" else case
            self.session.attempt(str(dtype), partial(self.case, case, factor))
            self.save()

    def case(self, case: Case, factor: float) -> None:
        rows = min(SLICE_ROWS, -(-case.tokens // 3))
        errors = measure(case, factor, self.device, DRAWS, rows)
        self.results["cases"].append(
            case.describe()
            | {"factor": factor, "draws": DRAWS, "results": judge(errors), "errors": errors}
        )


def table(results: Json) -> str:
    """A line for each result of each variant."""
    lines = [f"{results['machine']['device']}; {results['seconds']:.0f} s"]
    for case in results["cases"]:
        sizes = f"N={case['tokens']} {'x'.join(map(str, case['widths']))}"
        lines.append(f"\n{case['dtype']}, {sizes}, mean of {case['draws']} draws")
        lines.append(f"{'':<16}{'error':>10}{'eager':>10}{'ratio':>8}")
        for name, judged in case["results"].items():
            for key, found in judged.items():
                ratio = "-" if found["ratio"] is None else f"{found['ratio']:.3f}"
                verdict = "met" if found["met"] else f"MISSED: {found['broken']}"
                lines.append(
                    f"{name:<6}{key:<10}{found['error']:>10.2e}{found['eager']:>10.2e}"
                    f"{ratio:>8}  {verdict}"
                )
    return "\n".join([*lines, *(f"problem: {problem}" for problem in results["problems"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and say by the exit code whether the rule holds."""
    benchmark = AccuracyBenchmark(parse_device(make_parser(__doc__, SECONDS), arguments))
    complete = benchmark.run_and_save()
    print(table(benchmark.results))
    done = benchmark.results["cases"]
    judged = [found for case in done for v in case["results"].values() for found in v.values()]
    whole = complete and len(done) == len(DTYPES)
    return int(not whole or not all(found["met"] for found in judged))


if __name__ == "__main__":
    sys.exit(main())
