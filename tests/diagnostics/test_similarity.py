"""CKA, cosines and relative norm against their definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.diagnostics import SimilaritySums, SpectrumSums, similarity


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """tr(K H L H) of the linear kernels, with the N x N matrices."""
    centring = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    return ((x @ x.T) @ centring @ (y @ y.T) @ centring).trace()


def related(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 3
    y = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 5 + x - 1
    return x, y


@pytest.mark.parametrize(
    "dtypes, tolerance",
    [
        ((torch.float64, torch.float64), 1e-11),
        ((torch.float32, torch.float32), 1e-6),
        ((torch.bfloat16, torch.float32), 1e-6),
        ((torch.float32, torch.float64), 1e-6),
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [6, 700])
def test_equals_the_definitions(
    columns: int, dtypes: tuple[torch.dtype, torch.dtype], tolerance: float
) -> None:
    x, y = (z.to(dtype) for z, dtype in zip(related(300, columns), dtypes, strict=True))
    got = similarity(x, y)
    x, y = x.double(), y.double()
    cka = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    centred = F.cosine_similarity(x - x.mean(dim=0), y - y.mean(dim=0)).mean()
    assert got.cka == pytest.approx(float(cka), rel=tolerance)
    assert got.cosine == pytest.approx(float(F.cosine_similarity(x, y).mean()), rel=tolerance)
    assert got.centred_cosine == pytest.approx(float(centred), rel=tolerance)
    expected = float(x.norm(dim=1).mean() / y.norm(dim=1).mean())
    assert got.relative_norm == pytest.approx(expected, rel=tolerance)


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    y = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [0.0, 5.0]])
    # y centred: (3, 7/3), (-3, -17/3), (0, 10/3); x^T y = (6, 8), |x^T x| = 2, y^T y =
    # [[18, 24], [24, 146/3]]
    got = similarity(x, y)
    expected = (36 + 64) / (2 * math.sqrt(18**2 + 2 * 24**2 + (146 / 3) ** 2))
    assert got.cka == pytest.approx(expected, rel=1e-6)
    assert got.cosine == pytest.approx((0.6 + 0.6 + 0) / 3)
    assert got.relative_norm == pytest.approx(2 / 15)


def test_cka_is_blind_to_rotation_scale_and_offset() -> None:
    x, y = related(200, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert similarity(7 * x @ rotation + 9, y).cka == pytest.approx(similarity(x, y).cka)
    assert similarity(x @ rotation, x).cka == pytest.approx(1.0)


def test_cka_of_independent_features_is_as_documented() -> None:
    x, y = torch.randn(2, 400, 100, generator=torch.Generator().manual_seed(0))
    assert similarity(x, y).cka == pytest.approx(100 / 500, abs=0.01)


def test_undefined() -> None:
    x, y = (z.float() for z in related(20, 3))
    constant = similarity(torch.full_like(x, 0.1), y)
    assert math.isnan(constant.cka) and constant.centred_cosine == 0
    nothing = similarity(x, torch.zeros_like(y))
    assert nothing.cosine == 0 and math.isnan(nothing.relative_norm)
    spectra = SpectrumSums().update(x), SpectrumSums().update(y)
    assert math.isnan(SimilaritySums().update(x, y).result(*spectra).centred_cosine)


def test_bad_input() -> None:
    x, y = related(20, 3)
    with pytest.raises(ValueError, match=r"reference: expected shape \(20, 3\), got \(19, 3\)"):
        similarity(x, y[1:])
    with pytest.raises(ValueError, match=r"reference: expected shape \(N, 3\), got \(20, 2\)"):
        similarity(x, y[:, :2])
    with pytest.raises(ValueError, match="reference: expected finite"):
        similarity(x, y / 0)
    with pytest.raises(ValueError, match="features: expected at least 2 rows in all, got 1"):
        similarity(x[:1], y[:1])
    spectra = SpectrumSums().update(x), SpectrumSums().update(y[:10])
    with pytest.raises(ValueError, match="reference: expected sums over 20 rows, got 10"):
        SimilaritySums().update(x, y).result(*spectra)
