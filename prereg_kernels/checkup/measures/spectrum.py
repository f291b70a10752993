# SPDX-License-Identifier: Apache-2.0
"""The spectrum of features: over how many directions do they spread?"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from prereg_kernels.checkup.measures.scatter_matrix import Scatter
from prereg_kernels.checkup.measures.tensors import check_features


class Spectrum(NamedTuple):
    """How many directions features use, and how much their dimensions repeat each other."""

    effective_dimension: float  # participation ratio, 1 to D
    mean_correlation: float  # mean |Pearson correlation| between two dimensions, 0 to 1


class SpectrumSums:
    """`spectrum` of features that arrive in batches.

    Attributes:
        scatter: the sums themselves. One (D, D) matrix in float64 (128 MiB at D = 4096).
    """

    def __init__(self) -> None:
        self.scatter = Scatter()

    def update(self, features: Tensor) -> SpectrumSums:
        """Add a batch, (N, D), any floating dtype. Raises ValueError as `spectrum` does."""
        check_features(features, columns=self.scatter.columns[0])
        self.scatter.update(features)
        return self

    def result(self) -> Spectrum:
        """Of all rows so far. Raises ValueError where there are fewer than two."""
        if self.scatter.rows < 2:
            raise ValueError(f"features: expected at least 2 rows in all, got {self.scatter.rows}")
        variance = self.scatter.diagonal()  # all three are times the number of rows
        varying = variance > 0
        d = int(varying.sum())
        if not d:
            return Spectrum(math.nan, math.nan)
        # the trace and the squared Frobenius norm are the sums of lambda and lambda^2
        effective = float(variance.sum()) ** 2 / self.scatter.sum()
        scale = variance.rsqrt().where(varying, 0.0)
        correlation = (self.scatter.sum(scale, power=1) - d) / (d * (d - 1)) if d > 1 else math.nan
        return Spectrum(effective, correlation)


def spectrum(features: Tensor) -> Spectrum:
    """Effective dimension `(sum lambda)^2 / sum lambda^2` of the covariance, and mean correlation.

    With N rows the effective dimension is below N, and two independent dimensions correlate by
    about 0.8 / sqrt(N): compare layers at the same N only.

    Args:
        features: (N, D), N at least 2, any floating dtype. Constant dimensions are left out of the
            mean correlation, which is NaN with fewer than two others; the effective dimension is
            NaN where all rows are equal.

    Raises:
        ValueError: another shape, fewer than two rows, or values that are not finite.

    Example:
        >>> from prereg_kernels.checkup import spectrum
        >>> square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> found = spectrum(square)
        >>> round(found.effective_dimension, 6), round(found.mean_correlation, 6)
        (2.0, 0.0)
    """
    return SpectrumSums().update(features).result()
