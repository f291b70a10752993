# SPDX-License-Identifier: Apache-2.0
"""Checks of the row primitives against formulas in float64, for any backend on the CPU.

A matrix can be laid out as the pipeline's views are: rows apart from each other, off the alignment
of a vector, transposed. What surrounds a matrix that is written must stay as it was.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.spec import Spec
from tests.helpers import relative_error
from tests.ops.backends.test_torch import BOUND, act, draw, losses_of

LAYOUTS = ("plain", "offset", "strided")
SENTINEL = 3.0
# The column counts end one short of, on and one past the ends of vectors
SHAPES = ((0, 7), (1, 1), (3, 7), (5, 31), (3, 32), (4, 33), (40, 1100), (2, 4097))


class Kind(NamedTuple):
    loss: str
    normalize: str


KINDS = (
    Kind("cosine", "none"),
    *(Kind(loss, norm) for loss in ("mse", "smooth_l1", "l1") for norm in ("none", "l2", "layer")),
)


class Placed:
    """A matrix of these values in a layout: `view`, and whether its surroundings are untouched."""

    def __init__(self, values: Tensor, layout: str = "plain") -> None:
        n, columns = values.shape
        if layout == "offset":
            self.buffer = values.new_full((n * columns + 2,), SENTINEL)
            self.view = self.buffer[1:-1].view(n, columns)
        elif layout == "strided":
            self.buffer = values.new_full((n + 2, columns + 3), SENTINEL)
            self.view = self.buffer[1:-1, 1:-2]
        elif layout == "transposed":
            self.buffer = values.new_full((columns, n), SENTINEL)
            self.view = self.buffer.T
        else:
            self.buffer = values.new_full((n, columns), SENTINEL)
            self.view = self.buffer
        self.view.copy_(values)

    def assert_surroundings_untouched(self) -> None:
        self.view.fill_(SENTINEL)
        assert (self.buffer == SENTINEL).all()


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw_index(count: int, of: int) -> Tensor:
    """`count` different rows of `of`, in no order."""
    return torch.randperm(of, generator=torch.Generator().manual_seed(5))[:count]


def check_gather(
    backend: Backend,
    shape: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    layout: str = "plain",
    indexed: bool = True,
) -> None:
    n, columns = shape
    source = Placed(draw(n + 3, columns, dtype=dtype), layout)
    index = draw_index(n, n + 3) if indexed else None
    chosen = index if index is not None else torch.arange(1, n + 1)
    out = Placed(torch.full(shape, math.nan, dtype=out_dtype), "offset")
    backend.gather_rows(source.view if indexed else source.view[1 : n + 1], index, out.view)
    assert torch.equal(out.view, source.view[chosen].to(out_dtype))
    out.assert_surroundings_untouched()


def check_scatter(
    backend: Backend,
    shape: tuple[int, int],
    dtype: torch.dtype,
    into_dtype: torch.dtype,
    layout: str,
    indexed: bool,
    scale: float | None,
    residual: str,
) -> None:
    """residual: one of RESIDUALS, or "transposed"."""
    n, columns = shape
    values = Placed(draw(n, columns, dtype=dtype), layout)
    into = Placed(draw(n + 3, columns, dtype=into_dtype, seed=1), layout)
    add_layout = residual if residual == "transposed" else "offset"
    another = Placed(draw(n + 3, columns, dtype=into_dtype, seed=2), add_layout).view
    add = {"none": None, "into": into.view}.get(residual, another)
    index = draw_index(n, n + 3) if indexed else None
    chosen = index if index is not None else torch.arange(1, n + 1)
    expected = into.view.double()
    added = values.view.double() * (1 if scale is None else scale)
    expected[chosen] = added if add is None else added + add[chosen].double()
    factor = None if scale is None else torch.tensor(scale, dtype=stat_dtype(dtype))
    kept = another.clone()
    target = into.view if indexed else into.view[1 : n + 1]
    if add is not None and not indexed:
        add = add[1 : n + 1]
    backend.scatter_rows(values.view, target, index, factor, add)
    assert torch.equal(another, kept)
    untouched = torch.ones(n + 3, dtype=torch.bool).index_fill(0, chosen, False)
    assert torch.equal(into.view[untouched].double(), expected[untouched])
    assert relative_error(into.view, expected) < BOUND[into_dtype]
    into.assert_surroundings_untouched()


def check_start(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype, residual: str | None
) -> None:
    """residual: its layout, or None."""
    n, columns = shape
    index, values = draw_index(n, 2 * n + 3), draw(2 * n + 3, columns, dtype=dtype)
    add = None if residual is None else Placed(values, residual).view
    kept = None if add is None else add.clone()
    into = Placed(torch.full_like(values, math.nan), "offset")
    left = backend.start_rows(into.view, index, add)
    others = torch.ones(2 * n + 3, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(into.view[others], values[others] * (add is not None))
    assert left is None if add is None else torch.equal(left[index], values[index])
    assert add is None or torch.equal(add, kept)
    into.assert_surroundings_untouched()


def check_activation(
    backend: Backend,
    shape: tuple[int, int],
    dtype: torch.dtype,
    activation: str,
    layout: str = "plain",
    bias_dtype: torch.dtype | None = None,
) -> None:
    n, columns = shape
    u, dg = (Placed(2 * draw(n, columns, dtype=dtype, seed=seed), layout) for seed in (0, 1))
    bias = None if bias_dtype is None else draw(columns, dtype=bias_dtype, seed=2)
    exact = u.view.double() + (0 if bias is None else bias.double())
    g = act(exact.requires_grad_(), activation)
    (du,) = torch.autograd.grad(g, exact, dg.view.double())
    kept, out = u.view.clone(), Placed(torch.full_like(u.view, math.nan), layout)
    backend.activate(u.view, bias, activation, out.view)
    assert relative_error(out.view, g.detach()) < BOUND[dtype]

    sums, expected_sums = draw(columns, seed=3).to(stat_dtype(dtype)), du.sum(0)
    again = dg.view.clone()
    backend.activation_backward(dg.view, u.view, bias, activation, sums)
    assert relative_error(dg.view, du) < BOUND[dtype]
    assert relative_error(sums, expected_sums) < BOUND[dtype]
    backend.activation_backward(again, u.view, bias, activation, None)
    assert torch.equal(again, dg.view), "the sums change nothing"
    assert torch.equal(u.view, kept)
    backend.activate(u.view, bias, activation, u.view)
    assert torch.equal(u.view, out.view), "g may be u"
    for written in (u, dg, out):
        written.assert_surroundings_untouched()


def check_losses(
    backend: Backend,
    shape: tuple[int, int],
    dtype: torch.dtype,
    kind: Kind,
    *,
    anchor_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    eps: float = 1e-8,
    layout: str = "plain",
    anchor_layout: str = "plain",
    indexed: bool = True,
    in_place: bool = True,
    expanded: bool = False,
) -> None:
    n, columns = shape
    spec = Spec("gelu", *kind, eps, dtype)
    # norms on both sides of eps where it is a norm's size
    norms = 0.3 + 2 * torch.arange(n).unsqueeze(1) / max(n, 1)
    z = Placed((eps * norms * columns**-0.5 if eps > 1 else norms) * draw(n, columns), layout)
    z = Placed(z.view.to(dtype), layout)
    anchor = Placed(2 * draw(n + 3, columns, dtype=anchor_dtype or dtype, seed=1), anchor_layout)
    index = draw_index(n, n + 3) if indexed else None
    chosen = index if index is not None else torch.arange(1, n + 1)
    t = anchor.view if indexed else anchor.view[1 : n + 1]
    bias = None if bias_dtype is None else draw(columns, dtype=bias_dtype, seed=4)
    # times the columns, which a mean divides by: float16 has no such small gradients
    coefficient = columns * draw(n, seed=2).to(spec.stat_dtype)
    if expanded:
        coefficient = torch.tensor(0.7 * columns, dtype=spec.stat_dtype).expand(n)
    exact = (z.view.double() + (0 if bias is None else bias.double())).requires_grad_()
    expected = losses_of(exact, anchor.view[chosen].double(), spec)
    (gradient,) = torch.autograd.grad(expected, exact, coefficient.double())

    kept_z, kept_anchor = z.view.clone(), anchor.view.clone()
    buffer = torch.full((2, n + 2), SENTINEL, dtype=spec.stat_dtype)
    losses, again = buffer[0, 1:-1], buffer[1, 1:-1]
    backend.token_losses(LossChunk(z.view, bias, t, index, losses), spec)
    assert relative_error(losses, expected.detach()) < 2 * BOUND[stat_dtype(dtype)]
    assert torch.equal(z.view, kept_z)
    dz = z if in_place else Placed(torch.full_like(z.view, math.nan), layout)
    sums, expected_sums = draw(columns, seed=3).to(spec.stat_dtype), gradient.sum(0)
    backend.token_losses(LossChunk(z.view, bias, t, index, again, coefficient, dz.view, sums), spec)
    assert torch.equal(again, losses)
    assert relative_error(dz.view, gradient) < 2 * BOUND[dtype]
    assert relative_error(sums, expected_sums) < 2 * BOUND[dtype]
    assert torch.equal(anchor.view, kept_anchor)
    assert in_place or torch.equal(z.view, kept_z)
    dz.assert_surroundings_untouched()
    losses.fill_(SENTINEL)
    again.fill_(SENTINEL)
    assert (buffer == SENTINEL).all()
