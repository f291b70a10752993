# SPDX-License-Identifier: Apache-2.0
"""The forms of the matmuls: `python -m benchmarks.first.forms --out FILE`.

For each number of rows, D = M = A = 4096, bfloat16: x W^T without a bias and with one, d W, and d^T
x with its result in bfloat16, in float32 and added to a float32 sum; and the cast of that sum.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.common.program import Program, make_parser, run_program
from benchmarks.common.timing import Effort, Measured, Step, warm_and_interleave

ROWS, WIDTH = (18432, 9216, 6144, 4608), 4096
TINY_ROWS, TINY_WIDTH = (128,), 64
EFFORT, TINY = Effort(8, 30, 2.5), Effort(2, 2, 0.0)


def forms(rows: int, width: int, device: torch.device) -> dict[str, Step]:
    """By name, each into a buffer that is there."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, d, w, bias = draw(rows, width), draw(rows, width), draw(width, width), draw(width)
    w /= width**0.5
    out, product = torch.empty_like(x), torch.empty_like(w)
    total = torch.zeros(width, width, device=device)
    found: dict[str, Step] = {
        "x W^T": partial(torch.mm, x, w.T, out=out),
        "x W^T + b": partial(torch.addmm, bias, x, w.T, out=out),
        "d W": partial(torch.mm, d, w, out=out),
        "d^T x, bf16": partial(torch.mm, d.T, x, out=product),
        "cast of dW": lambda: product.copy_(total),
    }
    if device.type == "cuda":  # CPUs have no products with a result of another dtype
        wide = {"out_dtype": torch.float32, "out": total}
        found["d^T x, fp32"] = partial(torch.mm, d.T, x, **wide)
        found["d^T x, fp32, added"] = partial(torch.addmm, total, d.T, x, **wide)
    return found


class Forms(Program):
    """The largest number of rows first, which is the one that is shipped."""

    def run(self) -> None:
        is_tiny = self.options.size == "tiny"
        width = TINY_WIDTH if is_tiny else WIDTH
        self.results |= {"width": width, "forms": {}}
        for rows in TINY_ROWS if is_tiny else ROWS:
            effort = TINY if is_tiny else EFFORT
            self.session.attempt(f"{rows} rows", partial(self.rows, rows, width, effort))
            self.save()

    def rows(self, rows: int, width: int, effort: Effort) -> None:
        steps = {n: Measured(s) for n, s in forms(rows, width, self.session.device).items()}
        times, errors = warm_and_interleave(steps, self.session.clock, effort)
        flops = 2 * rows * width * width
        for name, error in errors.items():
            self.session.failed(f"{rows} rows, {name}", error, ours=True)
        found = self.results["forms"][str(rows)] = {}
        for name, samples in times.items():
            median = statistics.median(samples)
            rate = None if name == "cast of dW" else flops / median / 1e9
            found[name] = {"median_ms": median, "tflop_s": rate, "samples_ms": samples}
            shown = "" if rate is None else f"{rate:6.0f} TFLOP/s"
            print(f"{rows:6d} rows {name:20} {median:8.3f} ms {shown}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; by the exit code, whether all of them ran."""
    return run_program(Forms, make_parser(__doc__ or "", 30.0), arguments)


if __name__ == "__main__":
    sys.exit(main())
