"""Effective dimension and mean correlation on cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prereg_kernels.diagnostics import spectrum


def test_equals_eigenvalues_and_numpy_correlation() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    x = x @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    eigenvalues = np.linalg.eigvalsh(np.cov(x.numpy().T))
    correlation = np.abs(np.corrcoef(x.numpy().T))
    got = spectrum(x)
    ratio = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert got.effective_dimension == pytest.approx(ratio, rel=1e-10)
    assert got.mean_correlation == pytest.approx((correlation.sum() - 6) / 30, rel=1e-10)


def test_one_direction_and_constant_dimensions() -> None:
    t = torch.arange(5.0)[:, None]
    got = spectrum(torch.cat([t, -2 * t, torch.ones(5, 1)], dim=1))
    assert got.effective_dimension == pytest.approx(1.0)
    assert got.mean_correlation == pytest.approx(1.0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="features: expected at least 2 rows in all, got 1"):
        spectrum(torch.ones(1, 3))
    with pytest.raises(ValueError, match="finite"):
        spectrum(torch.full((3, 3), float("inf")))
