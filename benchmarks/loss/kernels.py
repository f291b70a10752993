# SPDX-License-Identifier: Apache-2.0
"""The row kernels one by one, against the copy bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.timing import Clock, Effort, Measured, Step, warm_and_interleave
from benchmarks.loss.cases import Case
from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.chunking import choose_chunk_rows, chunk_budget
from prereg_kernels.ops.products import wide_products
from prereg_kernels.ops.spec import Spec


@dataclass(frozen=True)
class Kernel:
    """A row primitive at work: what it reads and writes at least, as a formula and in bytes.

    In the formulas s is the size of an element; n rows of D = M = A columns.
    """

    name: str
    step: Step
    formula: str
    bytes: int
    before: Step | None = None


class Buffers:
    """A chunk's tensors at random values, by the names of the maths."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        shapes = [(o, i) for i, o in zip(case.widths, case.widths[1:], strict=False)]
        budget = chunk_budget(device, case.dtype, wide_products(device, case.dtype).product)
        self.n = n = choose_chunk_rows(
            case.tokens, case.widths[0], shapes, case.dtype.itemsize, budget
        )
        d, m, a = case.widths[0], case.widths[1], case.widths[-1]
        self.h, self.u, self.z = self.draw(n, d), self.draw(n, m), self.draw(n, a)
        self.g, self.dz = torch.empty_like(self.u), torch.empty_like(self.z)
        self.w1, self.w2 = self.draw(m, d) / d**0.5, self.draw(a, m) / m**0.5
        self.b1, self.b2 = self.draw(m) / 10, self.draw(a) / 10
        self.hidden, self.anchor = self.draw(2 * n, d), self.draw(2 * n, a)
        self.index = torch.arange(n, device=device) * 10 // 9  # a gap after every nine
        self.losses = torch.empty(n, device=device)
        self.coefficient = torch.full((n,), 1 / n, device=device)
        self.sums_m, self.sums_a = (torch.zeros(x, device=device) for x in (m, a))
        self.spec = Spec("gelu", "cosine", "none", 1e-8, case.dtype)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.case.dtype)


def row_kernels(rows: Backend, b: Buffers) -> list[Kernel]:
    """Every primitive, as the pipeline calls it."""
    s, n = b.case.dtype.itemsize, b.n
    d, m, a = b.case.widths[0], b.case.widths[1], b.case.widths[-1]
    b1, b2 = (rows.bias_left(bias, b.case.dtype) for bias in (b.b1, b.b2))
    dg = b.u.roll(1, 0)
    spec, act = b.spec, b.spec.activation
    into, others = torch.empty_like(b.hidden), b.hidden.shape[0] - n
    return [
        Kernel(
            "gather_rows",
            lambda: rows.gather_rows(b.hidden, b.index, b.h),
            "2 n D s + 8 n",
            2 * n * d * s + 8 * n,
        ),
        Kernel("activate", lambda: rows.activate(b.u, b1, act, b.g), "2 n M s", 2 * n * m * s),
        Kernel(
            "activation_backward",
            lambda: rows.activation_backward(b.g, b.u, b1, act, b.sums_m),
            "3 n M s",
            3 * n * m * s,
            lambda: b.g.copy_(dg),
        ),
        Kernel(
            "token_losses",
            lambda: rows.token_losses(LossChunk(b.z, b2, b.anchor, b.index, b.losses), spec),
            "2 n A s + 12 n",
            2 * n * a * s + 12 * n,
        ),
        Kernel(
            "token_losses_and_grad",
            lambda: rows.token_losses(
                LossChunk(b.z, b2, b.anchor, b.index, b.losses, b.coefficient, b.dz, b.sums_a), spec
            ),
            "3 n A s + 16 n",
            3 * n * a * s + 16 * n,
        ),
        Kernel(
            "start_rows",
            lambda: rows.start_rows(into, b.index, b.hidden),
            "2 (T - n) D s + 8 n + 2 T",
            2 * others * d * s + 8 * n + 2 * b.hidden.shape[0],
        ),
        Kernel(
            "scatter_rows",
            lambda: rows.scatter_rows(b.h, into, b.index, None, None),
            "2 n D s + 8 n",
            2 * n * d * s + 8 * n,
        ),
        Kernel(
            "scatter_rows, residual",
            lambda: rows.scatter_rows(b.h, into, b.index, None, b.hidden),
            "3 n D s + 8 n",
            3 * n * d * s + 8 * n,
        ),
    ]


def time_row_kernels(
    rows: Backend, buffers: Buffers, clock: Clock, effort: Effort, copy_gb_s: float
) -> Iterator[dict[str, Any]]:
    """A record for each, in order; an "error" in place of times where it failed."""
    kernels = {kernel.name: kernel for kernel in row_kernels(rows, buffers)}
    steps = {name: Measured(kernel.step, kernel.before) for name, kernel in kernels.items()}
    times, errors = warm_and_interleave(steps, clock, effort)
    for name, kernel in kernels.items():
        record = {"backend": rows.name, "name": name, "rows": buffers.n}
        record |= {"widths": list(buffers.case.widths), "formula": kernel.formula}
        record["bytes"] = kernel.bytes
        if name in errors:
            yield record | {"error": errors[name]}
            continue
        median = statistics.median(times[name])
        rate = kernel.bytes / median / 1e6
        record |= {"median_ms": median, "gb_s": rate, "percent_of_copy": 100 * rate / copy_gb_s}
        yield record | {"samples_ms": times[name]}
