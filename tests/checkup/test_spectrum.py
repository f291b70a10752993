# SPDX-License-Identifier: Apache-2.0
"""Effective dimension and mean correlation on cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prereg_kernels.checkup import SpectrumSums, spectrum


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=["64", "32"]
)
@pytest.mark.parametrize("columns", [6, 700])  # within one strip of the matrix; over two
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_equals_eigenvalues_and_numpy_correlation(
    columns: int, offset: float, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = (x + offset * torch.randn(columns, generator=generator, dtype=torch.float64)).to(dtype)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.double().numpy().T))
    correlation = np.abs(np.corrcoef(x.double().numpy().T))
    got = spectrum(x)
    ratio = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    mean = (correlation.sum() - columns) / (columns * (columns - 1))
    assert got.effective_dimension == pytest.approx(ratio, rel=tolerance)
    assert got.mean_correlation == pytest.approx(mean, rel=tolerance)


def test_equal_and_independent_dimensions() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    assert spectrum(corners) == pytest.approx((4.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_direction_and_constant_dimensions(dtype: torch.dtype) -> None:
    t = torch.arange(1000.0, dtype=dtype)[:, None]
    constant = torch.tensor([0.1, 0.7, 1000.1, 1 / 3, -7e-5], dtype=dtype).expand(1000, 5)
    x = torch.cat([t, -2 * t, constant], dim=1)
    sums = SpectrumSums()
    for rows in x.split(299):  # whose sums of constants are not exact, nor their means equal
        sums.update(rows)
    assert sums.result() == pytest.approx((1.0, 1.0))


def test_undefined() -> None:
    equal = spectrum(torch.full((7, 3), 0.1, dtype=torch.float64))
    assert math.isnan(equal.effective_dimension) and math.isnan(equal.mean_correlation)
    single = spectrum(torch.randn(7, 1))
    assert single.effective_dimension == pytest.approx(1.0) and math.isnan(single.mean_correlation)


def test_batches_with_different_means_do_not_cancel() -> None:
    """The first batch is one far row, and a dimension drifts by 10,000 deviations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator)
    x[0] += 1e4
    x[:, 3] += torch.arange(2000) * 10
    sums = SpectrumSums().update(x[:1])
    for rows in x[1:].split(300):
        sums.update(rows)
    assert sums.result() == pytest.approx(spectrum(x.double()), rel=1e-6)


def test_too_few_rows() -> None:
    with pytest.raises(ValueError, match="features: expected at least 2 rows in all, got 1"):
        spectrum(torch.ones(1, 3))
