"""The spectrum of features: over how many directions do they spread?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """How many directions features use, and how much their dimensions repeat each other."""

    effective_dimension: float  # participation ratio, 1 to D
    mean_correlation: float  # mean |Pearson correlation| between two dimensions, 0 to 1


def spectrum(features: Tensor) -> Spectrum:
    """Effective dimension `(sum lambda)^2 / sum lambda^2` of the covariance, and mean correlation.

    Args:
        features: (N, D), N at least 2, any floating dtype. Constant dimensions are left out of the
            mean correlation, which is NaN with fewer than two others.

    Raises:
        ValueError: another shape, fewer than two rows, or values that are not finite.
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise ValueError(f"features: expected (N, D), N at least 2, got {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features: expected finite values, got NaN or infinity")
    x = features.double()
    x = x - x.mean(dim=0)
    covariance = x.T @ x / (len(x) - 1)
    # the trace and the squared Frobenius norm are the sums of lambda and lambda^2
    effective = covariance.trace().square() / covariance.square().sum()

    deviation = covariance.diagonal().sqrt()
    varying = deviation > 0
    scale = deviation[varying]
    correlation = (covariance[varying][:, varying] / scale / scale[:, None]).abs()
    d = len(scale)
    mean = (
        (correlation.sum() - correlation.trace()) / (d * (d - 1))
        if d > 1
        else x.new_tensor(float("nan"))
    )
    return Spectrum(float(effective), float(mean))
