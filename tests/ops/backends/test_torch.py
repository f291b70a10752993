# SPDX-License-Identifier: Apache-2.0
"""Each row primitive of plain PyTorch against a formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.backends.torch import TorchBackend
from prereg_kernels.ops.spec import Spec
from tests.helpers import KERNEL_ACTIVATIONS, relative_error

BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = list(BOUND)
RESIDUALS = ("none", "another", "into")  # what `scatter_rows` adds to
BACKEND = TorchBackend()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def act(u: Tensor, name: str) -> Tensor:
    if name == "relu":
        return u * (u > 0)
    if name == "silu":
        return u / (1 + torch.exp(-u))
    if name == "gelu":
        return u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    return u * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def losses_of(z: Tensor, t: Tensor, spec: Spec) -> Tensor:
    if spec.normalize == "l2" or spec.loss == "cosine":
        z, t = (x / x.square().sum(1, keepdim=True).sqrt().clamp_min(spec.eps) for x in (z, t))
    if spec.normalize == "layer":
        z, t = (x - x.mean(1, keepdim=True) for x in (z, t))
        z, t = (x / (x.square().mean(1, keepdim=True) + spec.eps).sqrt() for x in (z, t))
    if spec.loss == "cosine":
        return -(z * t).sum(1)
    gap = (z - t).abs()
    distances = {
        "mse": gap**2,
        "smooth_l1": torch.where(gap < 1, gap**2 / 2, gap - 0.5),
        "l1": gap,
        "huber(delta=0.5)": torch.where(gap < 0.5, gap**2 / 2, 0.5 * (gap - 0.25)),
    }
    return distances[spec.loss].mean(1)


def check_zero_target(backend: Backend, device: str | torch.device = "cpu") -> None:
    """Of a target of zeros the cosine and its gradient are exactly 0: Adam would scale noise up."""
    z, t = draw(40, 100).to(device), torch.zeros(40, 100, device=device)
    losses, dz = (torch.full(size, math.nan, device=device) for size in ((40,), (40, 100)))
    spec = Spec("gelu", "cosine", "none", 1e-8, torch.float32)
    ones = torch.ones(40, device=device)
    backend.token_losses(LossChunk(z, None, t, None, losses, ones, dz, None), spec)
    assert losses.count_nonzero() == 0 and dz.count_nonzero() == 0


def test_zero_target() -> None:
    check_zero_target(BACKEND)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("indexed", (False, True))
def test_gather_rows(dtype: torch.dtype, indexed: bool) -> None:
    source = draw(10, 4)
    index = torch.tensor([9, 0, 4]) if indexed else None
    out = torch.full((3, 4), math.nan, dtype=dtype)
    BACKEND.gather_rows(source if indexed else source[1:4], index, out)
    assert torch.equal(out, source[[9, 0, 4] if indexed else [1, 2, 3]].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("indexed", (False, True))
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("scale", (None, 0.25))
def test_scatter_rows(
    dtype: torch.dtype, indexed: bool, residual: str, scale: float | None
) -> None:
    into, values = draw(10, 4, dtype=dtype), draw(3, 4, seed=1).to(dtype)
    add = {"none": None, "another": draw(10, 4, dtype=dtype, seed=2), "into": into}[residual]
    expected = into.double()
    chosen = [9, 0, 4] if indexed else [1, 2, 3]
    added = values.double() * (scale or 1)
    expected[chosen] = added if add is None else added + add[chosen].double()
    index = torch.tensor(chosen) if indexed else None
    factor = None if scale is None else torch.tensor(scale)
    if indexed:
        BACKEND.scatter_rows(values, into, index, factor, add)
    else:
        BACKEND.scatter_rows(values, into[1:4], None, factor, None if add is None else add[1:4])
    assert torch.equal(into, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", (False, True))
def test_start_rows(dtype: torch.dtype, residual: bool) -> None:
    into, add = draw(10, 4, dtype=dtype), draw(10, 4, dtype=dtype, seed=1) if residual else None
    left = BACKEND.start_rows(into, torch.tensor([9, 0, 4]), add)
    others = [1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(into[others], torch.zeros(7, 4).to(dtype) if add is None else add[others])
    assert left is None if add is None else left is into and torch.equal(into, add)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_activations(dtype: torch.dtype, activation: str) -> None:
    u, dg = draw(6, 33, dtype=dtype), draw(6, 33, dtype=dtype, seed=1)
    exact = u.double().clone().requires_grad_()
    g = act(exact, activation)
    (du,) = torch.autograd.grad(g, exact, dg.double())
    kept, out = u.clone(), torch.full_like(u, math.nan)
    BACKEND.activate(u, None, activation, out)
    assert relative_error(out, g.detach()) < BOUND[dtype] and torch.equal(u, kept)
    sums = draw(33, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=2)
    expected_sums = du.sum(0)
    BACKEND.activation_backward(dg, u, None, activation, sums)
    assert relative_error(dg, du) < BOUND[dtype], "dg is overwritten"
    assert relative_error(sums, expected_sums) < BOUND[dtype]
    BACKEND.activate(u, None, activation, u)
    assert torch.equal(u, out), "g may be u"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ("cosine", "mse", "smooth_l1", "l1", "huber(delta=0.5)"))
@pytest.mark.parametrize("normalize", ("none", "l2", "layer"))
@pytest.mark.parametrize("eps", (1e-8, 3.0))
@pytest.mark.parametrize("in_place", (False, True))
def test_token_losses(
    dtype: torch.dtype, loss: str, normalize: str, eps: float, in_place: bool
) -> None:
    spec = Spec("gelu", loss, "none" if loss == "cosine" else normalize, eps, dtype)
    scale = torch.tensor([[0.1], [1.0], [0.3], [2.0], [0.5]], dtype=dtype)  # around eps = 3
    z, anchor = 2 * draw(5, 9, dtype=dtype) * scale, 2 * draw(8, 9, dtype=dtype, seed=1)
    index = torch.tensor([7, 1, 2, 6, 4])
    coefficient = draw(5, seed=2).to(spec.stat_dtype)
    exact = z.double().clone().requires_grad_()
    expected = losses_of(exact, anchor[index].double(), spec)
    (gradient,) = torch.autograd.grad(expected, exact, coefficient.double())
    expected = expected.detach()

    kept_z, kept_anchor = z.clone(), anchor.clone()
    bound = BOUND[torch.float64 if dtype == torch.float64 else torch.float32]
    losses, again = (torch.full((5,), math.nan, dtype=spec.stat_dtype) for _ in range(2))
    BACKEND.token_losses(LossChunk(z, None, anchor, index, losses), spec)
    assert relative_error(losses, expected) < bound
    assert torch.equal(z, kept_z)
    dz = z if in_place else torch.empty_like(z)
    sums, expected_sums = draw(9, seed=3).to(spec.stat_dtype), gradient.sum(0)
    BACKEND.token_losses(LossChunk(z, None, anchor, index, again, coefficient, dz, sums), spec)
    assert torch.equal(again, losses)
    assert relative_error(dz, gradient) < BOUND[dtype]
    assert relative_error(sums, expected_sums) < BOUND[dtype]
    assert torch.equal(anchor, kept_anchor) and (in_place or torch.equal(z, kept_z))
    BACKEND.token_losses(LossChunk(kept_z, None, anchor[index], None, again), spec)
    assert torch.equal(again, losses), "without an index, the rows are the anchor's own"
