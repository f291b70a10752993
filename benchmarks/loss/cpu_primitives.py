# SPDX-License-Identifier: Apache-2.0
"""The CPU row primitives, one by one.

A primitive is measured by the bytes that it has to move: each element that it reads, once, and
each that it writes, once (BYTES). Its yardstick is `copy_` of float32, which reads and writes as
many bytes on as many threads, from the same level of the memory: what fits into a cache is compared
with a copy within that cache. In-place primitives can exceed a copy, which has a line to fetch
before it can write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.spec import Spec

# A chunk that stays in the second or third level of cache, and one that stays in none
SIZES = {"cache": (512, 1024), "memory": (16384, 2048), "tiny": (16, 16)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Bytes an element of the chunk, e = bytes of the dtype
BYTES = {
    "gather_rows": "2 e: reads the source, writes out",
    "activate": "2 e: reads u, writes g",
    "activation_backward": "3 e: reads dg and u, writes dg; with column sums",
    "token_losses": "2 e: reads z and the anchor",
    "token_losses_and_grad": "3 e: reads z and the anchor, writes dz over z; with column sums",
    "scatter_rows": "2 e: reads the values, writes into",
    "scatter_rows, residual": "3 e: reads the values and the residual, writes into",
    "start_rows": "1 e: reads the residual, writes into, in the half that the index leaves out",
}


class Case(NamedTuple):
    name: str
    primitive: str  # of BYTES
    run: Callable[[], object]

    def bytes(self, count: int, columns: int, dtype: torch.dtype) -> int:
        """That it has to move."""
        return int(BYTES[self.primitive].split()[0]) * dtype.itemsize * count * columns


def cases(rows: Backend, count: int, columns: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every primitive on tensors of its own, with a bias and an index where it takes one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    index = torch.randperm(count, generator=generator)
    a, b, bias = draw(count, columns), draw(count, columns), draw(columns)
    out, scale = torch.empty_like(a), torch.tensor(0.5)
    # Where every derivative is 1: repeated in place, others would soon leave only subnormal numbers
    far = torch.full_like(a, 40)
    losses, sums = torch.empty(count), torch.zeros(columns)
    coefficient = torch.ones(()).expand(count)
    bias = rows.bias_left(bias, dtype)

    yield Case("gather_rows", "gather_rows", lambda: rows.gather_rows(a, index, out))
    for act in ("gelu", "gelu_tanh", "silu", "relu"):
        yield Case(f"activate, {act}", "activate", lambda act=act: rows.activate(a, bias, act, out))
        yield Case(
            f"activation_backward, {act}",
            "activation_backward",
            lambda act=act: rows.activation_backward(out, far, bias, act, sums),
        )
    for loss, normalize in (("cosine", "none"), ("mse", "none"), ("mse", "l2"), ("mse", "layer"),
                            ("smooth_l1", "layer")):  # fmt: skip
        spec = Spec("gelu", loss, normalize, 1e-8, dtype)
        yield Case(
            f"token_losses, {loss} {normalize}",
            "token_losses",
            lambda spec=spec: rows.token_losses(LossChunk(a, bias, b, index, losses), spec),
        )
        yield Case(
            f"token_losses_and_grad, {loss} {normalize}",
            "token_losses_and_grad",
            lambda spec=spec: rows.token_losses(
                LossChunk(a, bias, b, index, losses, coefficient, a, sums), spec
            ),
        )
    yield Case("scatter_rows", "scatter_rows", lambda: rows.scatter_rows(a, b, index, None, None))
    yield Case(
        "scatter_rows, residual, scale",
        "scatter_rows, residual",
        lambda: rows.scatter_rows(a, out, index, scale, b),
    )
    half = index[: count // 2]
    yield Case("start_rows", "start_rows", lambda: rows.start_rows(out, half, b))
