# SPDX-License-Identifier: Apache-2.0
"""CKA, cosines and relative norm against their definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.checkup import SimilaritySums, SpectrumSums, similarity


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """tr(K H L H) of the linear kernels, with the N x N matrices."""
    centring = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    return ((x @ x.T) @ centring @ (y @ y.T) @ centring).trace()


def unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, with the N x N matrices."""
    n = len(x)
    k, m = (z @ z.T - torch.diag((z @ z.T).diagonal()) for z in (x, y))
    rest = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
    return ((k @ m).trace() + rest) / (n * (n - 3))


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
    debiased = unbiased_hsic(x, y) / (unbiased_hsic(x, x) * unbiased_hsic(y, y)).sqrt()
    centred = F.cosine_similarity(x - x.mean(dim=0), y - y.mean(dim=0)).mean()
    assert got.cka == pytest.approx(float(cka), rel=tolerance)
    assert got.debiased_cka == pytest.approx(float(debiased), rel=tolerance)
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
    assert similarity(x @ rotation, x).debiased_cka == pytest.approx(1.0)


def test_independent_features() -> None:
    """CKA is as documented, its debiased version 0; of a subset both keep that."""
    x, y = torch.randn(2, 400, 100, generator=torch.Generator().manual_seed(0))
    for n in (400, 100):
        got = similarity(x[:n], y[:n])
        assert got.cka == pytest.approx(100 / (n + 100), abs=0.01)
        assert got.debiased_cka == pytest.approx(0, abs=0.01)


def test_undefined() -> None:
    x, y = (z.float() for z in related(20, 3))
    constant = similarity(torch.full_like(x, 0.1), y)
    assert math.isnan(constant.cka) and math.isnan(constant.debiased_cka)
    assert constant.centred_cosine == 0
    # float64 constants whose means are off by their last bits
    inexact = torch.tensor([0.1, 1 / 3, 1000.1], dtype=torch.float64).expand(299, 3)
    assert similarity(inexact, related(299, 3)[0]).centred_cosine == 0
    nothing = similarity(x, torch.zeros_like(y))
    assert nothing.cosine == 0 and math.isnan(nothing.relative_norm)
    spectra = SpectrumSums().update(x), SpectrumSums().update(y)
    without_means = SimilaritySums().update(x, y).result(*spectra)
    assert math.isnan(without_means.centred_cosine) and math.isnan(without_means.debiased_cka)
    assert without_means.cka == similarity(x, y).cka
    assert math.isnan(similarity(x[:3], y[:3]).debiased_cka)
    assert not math.isnan(similarity(x[:3], y[:3]).cka)


def test_one_row_that_outweighs_all_others() -> None:
    x, y = (z.float() for z in related(200, 5))
    x[7] += 1e5
    got = similarity(x, y)
    assert math.isnan(got.debiased_cka) and not math.isnan(got.cka)
    x[50:80] += 1e5  # not one alone
    double = similarity(x.double(), y.double()).debiased_cka
    assert similarity(x, y).debiased_cka == pytest.approx(double, rel=1e-6)


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
    spectra = SpectrumSums().update(x), SpectrumSums().update(y)
    for means in ((x.mean(dim=0) + 0.1, y.mean(dim=0)), (x.mean(dim=0), y[:10].mean(dim=0))):
        with pytest.raises(ValueError, match="means: expected those of the same rows"):
            SimilaritySums(means).update(x, y).result(*spectra)
