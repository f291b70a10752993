"""Each row primitive of plain PyTorch against a formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prereg_kernels.inputs import ACTIVATIONS, Spec
from prereg_kernels.rows import choose_rows, torch_rows
from tests.helpers import relative_error

BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = list(BOUND)


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
    return (gap**2 if spec.loss == "mse" else torch.where(gap < 1, gap**2 / 2, gap - 0.5)).mean(1)


def test_choose_rows() -> None:
    assert choose_rows("auto", torch.device("cpu")) is torch_rows
    assert choose_rows("torch", torch.device("cpu")) is torch_rows
    with pytest.raises(ValueError, match="backend: expected one of auto, torch; got 'cuda'"):
        choose_rows("cuda", torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("indexed", (False, True))
def test_gather_rows(dtype: torch.dtype, indexed: bool) -> None:
    source = draw(10, 4)
    index = torch.tensor([9, 0, 4, 3, 7]) if indexed else None
    chosen = [0, 4, 3] if indexed else [1, 2, 3]
    gathered = torch_rows.gather_rows(source, index, slice(1, 4), dtype)
    assert gathered.dtype == dtype
    assert torch.equal(gathered, source[chosen].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("indexed", (False, True))
def test_scatter_rows(dtype: torch.dtype, indexed: bool) -> None:
    into, values = draw(10, 4, dtype=dtype), draw(3, 4, seed=1)
    before = into.clone()
    index = torch.tensor([9, 0, 4, 3, 7]) if indexed else None
    chosen = [0, 4, 3] if indexed else [1, 2, 3]
    torch_rows.scatter_rows(into, index, slice(1, 4), values.to(dtype))
    expected = before.double()
    expected[chosen] += values.to(dtype).double()
    assert torch.equal(into, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(dtype: torch.dtype, activation: str) -> None:
    u, dg = draw(6, 33, dtype=dtype), draw(6, 33, dtype=dtype, seed=1)
    exact = u.double().clone().requires_grad_()
    g = act(exact, activation)
    (du,) = torch.autograd.grad(g, exact, dg.double())
    kept = u.clone()
    assert relative_error(torch_rows.activate(u, activation), g.detach()) < BOUND[dtype]
    written = torch_rows.activation_backward(dg, u, activation)
    assert relative_error(dg, du) < BOUND[dtype], "dg is overwritten"
    assert torch.equal(written, dg) and torch.equal(u, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ("cosine", "mse", "smooth_l1"))
@pytest.mark.parametrize("normalize", ("none", "l2", "layer"))
@pytest.mark.parametrize("eps", (1e-8, 3.0))
@pytest.mark.parametrize("in_place", (False, True))
def test_token_losses(
    dtype: torch.dtype, loss: str, normalize: str, eps: float, in_place: bool
) -> None:
    spec = Spec("gelu", loss, "none" if loss == "cosine" else normalize, eps, dtype)
    scale = torch.tensor([[0.1], [1.0], [0.3], [2.0], [0.5]], dtype=dtype)  # around eps = 3
    z, t = 2 * draw(5, 9, dtype=dtype) * scale, 2 * draw(5, 9, dtype=dtype, seed=1)
    coefficient = draw(5, seed=2).to(spec.stat_dtype)
    exact = z.double().clone().requires_grad_()
    expected = losses_of(exact, t.double(), spec)
    (gradient,) = torch.autograd.grad(expected, exact, coefficient.double())
    expected = expected.detach()

    kept_z, kept_t = z.clone(), t.clone()
    bound = BOUND[torch.float64 if dtype == torch.float64 else torch.float32]
    losses = torch_rows.token_losses(z, t, spec)
    assert losses.dtype == spec.stat_dtype
    assert relative_error(losses, expected) < bound
    assert torch.equal(z, kept_z)
    dz = z if in_place else torch.empty_like(z)
    again = torch_rows.token_losses_and_grad(z, t, coefficient, spec, dz)
    assert torch.equal(again, losses)
    assert relative_error(dz, gradient) < BOUND[dtype]
    assert torch.equal(t, kept_t) and (in_place or torch.equal(z, kept_z))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_column_sums(dtype: torch.dtype) -> None:
    values = draw(300, 5, dtype=dtype)
    into = draw(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=1)
    expected = into.double() + values.double().sum(0)
    torch_rows.add_column_sums(into, values)
    assert relative_error(into, expected) < 1e-6
