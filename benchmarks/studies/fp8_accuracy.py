# SPDX-License-Identifier: Apache-2.0
"""Would the head's matmuls do in fp8? What each would cost in accuracy, and could save in time.

    python -m benchmarks.studies.fp8_accuracy             # about half an hour on one core with AMX
    python -m benchmarks.studies.fp8_accuracy --table     # prints what is there

Every subset of the six matmuls runs on fp8 operands, the others on bfloat16 ones, everything
between them as in the package. An fp8 operand is rounded to 8 bits under the scales of a scheme,
and multiplied as float32: on a CPU this is exact but for float32's own rounding, where a GPU sums
in fewer bits, so that the errors are bounds from below. Gradients are compared with those of
float64 from the same bfloat16 inputs, and so are those of the package's bfloat16 path. The times
are bounds as well, by counting at the datasheet's rates. Writes
benchmarks/results/fp8_accuracy.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.report import RESULTS, made_on
from prereg_kernels import PReHead
from prereg_kernels._util.machine import describe_machine
from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.torch import TorchBackend
from prereg_kernels.ops.spec import Spec
from tests.helpers import Problem, relative_error, run_tap, run_truth

OUT = RESULTS / "fp8_accuracy.json"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MATMULS = ("u", "z", "dg", "dW2", "dW1", "dh")  # what each of them computes
FORWARD, DG = frozenset(("u", "z")), frozenset(("u", "z", "dg"))
# the matmuls that a result depends on
BEHIND = {
    "loss": FORWARD,
    "db2": FORWARD,
    "dW2": FORWARD | {"dW2"},
    "db1": DG,
    "dW1": DG | {"dW1"},
    "dh": DG | {"dh"},
}
OTHER_NAMES = {"dh": "dhidden", "dW1": "dW0", "dW2": "dW1", "db1": "db0", "db2": "db1"}
COSINE_BAR, SPEED_BAR = 0.999, 1.4
BLOCK = 128
# D = M = A, and N: LLaVA's own, one at a time
SIZES = ((1024, 18_432), (4096, 4096))
STEPS, STEP_ROWS = 300, 2048


class Scheme(NamedTuple):
    """Formats, and how far one scale reaches: along a whole contraction, or through a block."""

    name: str
    gradient: torch.dtype  # of dz and du; everything else is e4m3
    granularity: str  # "tensor", "row" or "block"


SCHEMES = (
    Scheme("row", E4M3, "row"),
    Scheme("row, e5m2 gradients", E5M2, "row"),
    Scheme("tensor", E4M3, "tensor"),
    Scheme("block of 128", E4M3, "block"),
)


def quantise(x: Tensor, dim: int, dtype: torch.dtype, granularity: str) -> tuple[Tensor, Tensor]:
    """x (2-dim) in 8 bits, contracted over `dim` later, and the scales that bring it back.

    "row": a scale for each slice along `dim`; "tensor": a single one; "block": for each 128
    elements along `dim` ("tile": and across it). The largest value becomes the format's largest.
    """
    x = x.float()
    if granularity == "tensor":
        largest = x.abs().max().view(1, 1)
    elif granularity == "row":
        largest = x.abs().amax(dim, keepdim=True)
    else:
        largest = _largest_of_blocks(x.abs(), dim)
        if granularity == "tile":
            largest = _largest_of_blocks(largest, 1 - dim)
    scale = (largest / torch.finfo(dtype).max).masked_fill_(largest == 0, 1)
    return (x / scale).to(dtype), scale


def _largest_of_blocks(x: Tensor, dim: int) -> Tensor:
    parts = [part.amax(dim, keepdim=True).expand_as(part) for part in x.split(BLOCK, dim)]
    return torch.cat(parts, dim)


class Step:
    """The head's six matmuls, any of them in fp8; results are kept for the subsets that share them.

    A subset is given as the set of those matmuls that run in fp8.
    """

    def __init__(self, problem: Problem, scheme: Scheme) -> None:
        assert problem.biases is not None
        self.h, self.t, self.scheme = problem.hidden, problem.anchor, scheme
        self.w1, self.w2 = problem.weights
        self.b1, self.b2 = problem.biases
        dtype = self.h.dtype
        self.spec = Spec("gelu", "cosine", "none", 1e-8, dtype)
        self.rows = TorchBackend()
        self.kept: dict[tuple[str, frozenset[str]], Any] = {}

    def result(self, name: str, fp8: frozenset[str]) -> Tensor:
        """One of BEHIND."""
        if name in ("loss", "db2"):
            return self._backward_z(fp8)[0 if name == "loss" else 2]
        if name == "db1":
            return self._backward_g(fp8)[1]
        if name == "dW2":
            return self._multiply(name, fp8, self._backward_z(fp8)[1].T, self._forward(fp8)[1])
        du = self._backward_g(fp8)[0]
        if name == "dW1":
            return self._multiply(name, fp8, du.T, self.h)
        return self._multiply(name, fp8, du, self.w1)

    def _keep(self, name: str, fp8: frozenset[str], compute: Callable[[], Any]) -> Any:
        if (name, fp8) not in self.kept:
            self.kept[name, fp8] = compute()
        return self.kept[name, fp8]

    def _forward(self, fp8: frozenset[str]) -> tuple[Tensor, Tensor]:
        """u and g."""

        def compute() -> tuple[Tensor, Tensor]:
            u = self._multiply("u", fp8, self.h, self.w1.T, self.b1)
            g = torch.empty_like(u)
            self.rows.activate(u, None, "gelu", g)
            return u, g

        return self._keep("g", fp8 & {"u"}, compute)

    def _backward_z(self, fp8: frozenset[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss, dz and db2."""

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            dz = self._multiply("z", fp8, self._forward(fp8)[1], self.w2.T, self.b2)
            count, stat = len(dz), self.spec.stat_dtype
            losses, db2 = dz.new_empty(count, dtype=stat), dz.new_zeros(dz.shape[1], dtype=stat)
            each = losses.new_full((count,), 1 / count)
            self.rows.token_losses(
                LossChunk(dz, None, self.t, None, losses, each, dz, db2), self.spec
            )
            return losses.mean(), dz, db2.to(dz.dtype)

        return self._keep("dz", fp8 & FORWARD, compute)

    def _backward_g(self, fp8: frozenset[str]) -> tuple[Tensor, Tensor]:
        """du and db1."""

        def compute() -> tuple[Tensor, Tensor]:
            du = self._multiply("dg", fp8, self._backward_z(fp8)[1], self.w2)
            db1 = du.new_zeros(du.shape[1], dtype=self.spec.stat_dtype)
            self.rows.activation_backward(du, self._forward(fp8)[0], None, "gelu", db1)
            return du, db1.to(du.dtype)

        return self._keep("du", fp8 & DG, compute)

    def _multiply(
        self, name: str, fp8: frozenset[str], a: Tensor, b: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """a @ b + bias, rounded once."""
        if name not in fp8:
            return a @ b if bias is None else torch.addmm(bias, a, b)
        (a8, a_scale), (b8, b_scale) = quantised_operands(name, a, b, self.scheme)
        product = (a8.float() * a_scale) @ (b8.float() * b_scale)
        return (product if bias is None else product + bias.float()).to(a.dtype)


def quantised_operands(
    name: str, a: Tensor, b: Tensor, scheme: Scheme
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both operands of `name` = a @ b: a contracted over dim 1, b over dim 0.

    So each of the six tensors h, g, dz, du, W1 and W2 is needed in 8 bits twice: its scales run
    along the features for one product, and along the rows for the other.
    """
    first, second = (scheme.granularity,) * 2
    if scheme.granularity == "block" and not name.startswith("dW"):
        second = "tile"  # a weight: 128 x 128
    dtype = scheme.gradient if name.startswith("d") else E4M3
    return quantise(a, 1, dtype, first), quantise(b, 0, E4M3, second)


def subsets() -> Iterator[frozenset[str]]:
    """All 64, the small ones first."""
    for size in range(len(MATMULS) + 1):
        yield from map(frozenset, itertools.combinations(MATMULS, size))


def compare(ours: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative error, and cosine of the angle between the two as vectors."""
    x, y = ours.double().flatten(), truth.double().flatten()
    cosine = (x @ y / (x.norm() * y.norm())).item()
    return {"error": float(f"{relative_error(ours, truth):.4g}"), "cosine": round(cosine, 7)}


def judge(problem: Problem, scheme: Scheme, truth: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each subset: {"fp8": [...], "loss": {"error", "cosine"}, "dh": ..., ...}."""
    step = Step(problem, scheme)
    found: dict[tuple[str, frozenset[str]], dict[str, float]] = {}
    for name, behind in BEHIND.items():
        for fp8 in subsets():
            if fp8 <= behind:
                found[name, fp8] = compare(step.result(name, fp8), truth[name])
    return [
        {"fp8": [x for x in MATMULS if x in fp8]}
        | {name: found[name, fp8 & behind] for name, behind in BEHIND.items()}
        for fp8 in subsets()
    ]


def by_name(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of `run_tap` and `run_truth`, which count a head's matrices from 0."""
    return {name: results[OTHER_NAMES.get(name, name)] for name in BEHIND}


class Features:
    """Synthetic hidden states and anchors: two functions of common factors, and noise.

    The factors' variances fall off as 1/k. Hidden states have features of unequal size, four of
    them outliers; anchors a large common component, as projected image features have.
    """

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        rank = width // 32
        sizes = torch.arange(1, rank + 1).rsqrt()
        self.sizes = sizes / sizes.norm()
        self.to_hidden, self.gain = draw(rank, width), draw(width).mul_(0.5).exp_()
        self.gain[torch.randperm(width, generator=generator)[:4]] *= 30
        self.inner, self.to_anchor = 2 * draw(rank, rank), draw(rank, width) / math.sqrt(rank)
        self.common = 2 * draw(width)

    def draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """(rows, D) and (rows, A), bfloat16."""
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randn(rows, len(self.sizes), generator=generator) * self.sizes
        noise = torch.randn(2, rows, len(self.gain), generator=generator)
        hidden = (factors @ self.to_hidden + 0.1 * noise[0]) * self.gain
        t = torch.tanh(factors @ self.inner) @ self.to_anchor
        anchor = t / t.std() + self.common + 0.05 * noise[1]
        return hidden.bfloat16(), anchor.bfloat16()


def train(features: Features, width: int, steps: int, rows: int) -> PReHead:
    """A head after so many steps of AdamW in float32, each on rows of its own."""
    torch.manual_seed(0)
    head = PReHead(width, width)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1.0 / width, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0 / width, max(steps, 2), pct_start=0.1
    )
    for step in range(steps):
        optimizer.zero_grad()
        head(*features.draw(rows, step + 1)).backward()
        optimizer.step()
        schedule.step()
    return head


def measure(width: int, tokens: int, steps: int, rows: int = STEP_ROWS) -> dict[str, Any]:
    """One size, with the head after so many steps: what every scheme does to every subset."""
    features = Features(width)
    head = train(features, width, steps, rows)
    hidden, anchor = features.draw(tokens, 0)
    weights = [w.detach().bfloat16() for w in head.weights]
    biases = [None if b is None else b.detach().bfloat16() for b in head.biases]
    problem = Problem(hidden, anchor, weights, biases)
    truth, ours = by_name(run_truth(problem)), by_name(run_tap(problem))
    return {
        "width": width,
        "tokens": tokens,
        "steps": steps,
        "cosine": -truth["loss"].item(),
        "bfloat16": {name: compare(ours[name], truth[name]) for name in BEHIND},
        "schemes": {scheme.name: judge(problem, scheme, truth) for scheme in SCHEMES},
    }


@dataclass(frozen=True)
class Rates:
    """An H200's, as its datasheet has them, without sparsity."""

    bf16: float = 989e12
    fp8: float = 1979e12
    memory: float = 4.8e12


# The tensors that each matmul reads: it needs a copy in 8 bits of its own, as the scales run along
# what it contracts
OPERANDS = {
    "u": ("h", "W1"), "z": ("g", "W2"), "dg": ("dz", "W2"),
    "dW2": ("dz", "g"), "dW1": ("du", "h"), "dh": ("du", "W1"),
}  # fmt: skip


def bounds(fp8: frozenset[str], tokens: int = 18_432, width: int = 4096) -> dict[str, float]:
    """By how much a subset could be faster than all in bfloat16, at most.

    "matmuls": if nothing but the matmuls took time. "bytes": with the passes of the row primitives
    and the sums of weight gradients over three chunks (docs/performance.md), and with quantising
    in a pass that reads each tensor once, and writes each copy once.
    """
    rates = Rates()
    flops = 2 * tokens * width**2
    times = [flops / (rates.fp8 if x in fp8 else rates.bf16) for x in MATMULS]
    floor = len(MATMULS) * flops / rates.bf16
    passes = (12 * 2 * tokens * width + 2 * 16 * width**2) / rates.memory

    copies = [x for matmul in fp8 for x in OPERANDS[matmul]]
    elements = {x: width**2 if x.startswith("W") else tokens * width for x in copies}
    written = sum(elements[x] for x in copies)
    quantising = (2 * sum(elements.values()) + written) / rates.memory
    return {
        "matmuls": floor / sum(times),
        "bytes": (floor + passes) / (sum(times) + passes + quantising),
    }


def worst(row: dict[str, Any]) -> tuple[float, str]:
    """The smallest cosine among the gradients, and whose it is."""
    return min((row[name]["cosine"], name) for name in BEHIND if name != "loss")


def named(fp8: frozenset[str]) -> str:
    if len(fp8) in (0, len(MATMULS)):
        return "all six" if fp8 else "none"
    return ", ".join(x for x in MATMULS if x in fp8)


SHOWN = [frozenset((x,)) for x in MATMULS]
SHOWN += map(frozenset, (("u", "z"), ("dW2", "dW1"), ("dg", "dW2", "dW1", "dh")))
SHOWN += map(frozenset, (("u", "z", "dW2", "dW1"), MATMULS))


def print_table(stored: dict[str, Any]) -> None:
    """Markdown: subsets under scales of rows; then, for each scheme, the subsets near the bars."""
    cases = stored["cases"]
    heads = [f"D = {x['width']}, {'trained' if x['steps'] else 'new'} head |" for x in cases]
    print("| in fp8 | matmuls alone | with bytes |", *heads)
    print("|---|--:|--:|" + "---|" * len(cases))

    def line(fp8: frozenset[str], rows: list[dict[str, Any]], name: str) -> None:
        bound = bounds(fp8)
        cells = [f"{cosine:.4f} {result} |" for cosine, result in map(worst, rows)]
        print(f"| {name} | {bound['matmuls']:.2f}x | {bound['bytes']:.2f}x |", *cells)

    line(frozenset(), [case["bfloat16"] for case in cases], "none: the package")
    for fp8 in SHOWN:
        found = [_row(case["schemes"]["row"], fp8) for case in cases]
        line(fp8, found, named(fp8))

    bar = f"{SPEED_BAR}x"
    print(f"\n| scales | most accurate at {bar}, matmuls alone |", end="")
    print(f" most accurate at {bar}, with bytes | fastest above {COSINE_BAR} |\n|---|---|---|---|")
    for scheme in cases[0]["schemes"]:
        cosines = {
            fp8: min(worst(_row(case["schemes"][scheme], fp8))[0] for case in cases)
            for fp8 in subsets()
        }
        cells = [scheme]
        for bound in ("matmuls", "bytes"):
            fast = [fp8 for fp8 in cosines if bounds(fp8)[bound] >= SPEED_BAR]
            best = max(fast, key=lambda fp8: cosines[fp8])
            cells.append(f"{cosines[best]:.4f} ({named(best)})")
        exact = [fp8 for fp8, cosine in cosines.items() if cosine > COSINE_BAR]
        if exact:
            most = max(exact, key=lambda fp8: bounds(fp8)["bytes"])
            bound = bounds(most)
            cells.append(f"{bound['matmuls']:.2f}x, {bound['bytes']:.2f}x ({named(most)})")
        else:
            cells.append("none")
        print("|", " | ".join(cells), "|")
    print(f"\n{made_on(stored['machine'])}.")


def _row(rows: list[dict[str, Any]], fp8: frozenset[str]) -> dict[str, Any]:
    return next(row for row in rows if frozenset(row["fp8"]) == fp8)


def main() -> None:
    """Run everything, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return print_table(json.loads(arguments.out.read_text()))
    machine = describe_machine(torch.device("cpu"), None)
    cases = []
    for width, tokens in SIZES:
        for steps in (0, STEPS):
            cases.append(measure(width, tokens, steps))
            print(f"{width}, {tokens}, {steps} steps: {cases[-1]['bfloat16']}", flush=True)
    stored = {"machine": machine, "rates": vars(Rates()), "cases": cases}
    arguments.out.write_text(json.dumps(stored) + "\n")
    print_table(stored)


if __name__ == "__main__":
    main()
