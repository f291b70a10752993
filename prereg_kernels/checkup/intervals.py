# SPDX-License-Identifier: Apache-2.0
"""95% intervals: a bootstrap over images, and a t interval over the splits of a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000

Sums = Mapping[str, NDArray[np.float64]]
"""Sums over images, by name; the last axis is the layers."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval, whose ends are NaN where there is none.

    Attributes:
        deviation: of what the number is the mean of; NaN where that is not said.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    deviation: float = math.nan

    @property
    def half_width(self) -> float:
        """Of the interval, where it reaches equally far to both sides."""
        return (self.high - self.low) / 2

    @property
    def direction(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return 1 if self.low > 0 else (-1 if self.high < 0 else 0)


class Bootstrap:
    """Resamples images: whole images are drawn, since the patches of one know of each other.

    Args:
        images: how many there are. The draws depend on it alone, so that two models measured on the
            same images are resampled alike, and their difference is paired.

    Raises:
        ValueError: no images.
    """

    def __init__(self, images: int) -> None:
        if images < 1:
            raise ValueError(f"images: expected at least 1, got {images}")
        rng = np.random.default_rng(0)
        drawn = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
        self._weights = drawn.astype(np.float64)

    def estimate(
        self, per_image: Sums, measure: Callable[[Sums], NDArray[np.float64]]
    ) -> list[Estimate]:
        """A measure of sums over images, at each layer.

        Args:
            per_image: {name: (images, layers)}.
            measure: from {name: (..., layers)}, the sums over images, to (..., layers).

        Raises:
            ValueError: sums that are not finite: one would drop out of the draws unseen.
        """
        for name, values in per_image.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: expected finite sums, got NaN or infinity")
        with np.errstate(all="ignore"):  # 0 / 0 where there is no pair
            whole = measure({name: values.sum(axis=0) for name, values in per_image.items()})
        images = self._weights.shape[1]
        if images < 2:
            return [Estimate(float(value)) for value in whole]
        with np.errstate(all="ignore"):
            draws = measure({name: self._weights @ values for name, values in per_image.items()})
        return [
            Estimate(float(value), *_ends(draws[:, layer])) for layer, value in enumerate(whole)
        ]


def _ends(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Of a resample without any pair, nothing is known: with many of them there is no interval."""
    known = draws[np.isfinite(draws)]
    if len(known) < 0.95 * len(draws):
        return math.nan, math.nan
    low, high = np.percentile(known, (2.5, 97.5))
    return float(low), float(high)


def over_splits(values: Sequence[float], test_share: float) -> Estimate:
    """The mean of accuracies, or of paired differences, over the repeated splits of a probe.

    Raises:
        ValueError: as `half_width`.
    """
    half = half_width(values, test_share)
    mean = float(np.mean(values))
    return Estimate(mean, mean - half, mean + half)


def half_width(values: Sequence[float], test_share: float) -> float:
    """Of the t interval of a mean over splits; NaN for a single one.

    With Nadeau and Bengio's correction (2003), which scipy does not have: splits share most of
    their rows.

    Raises:
        ValueError: no values, some that are not finite, or a share outside of (0, 1).
    """
    from scipy.stats import t

    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values: expected finite values, at least 1, got {list(values)}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share: expected a share between 0 and 1, got {test_share}")
    n = len(values)
    if n < 2:
        return math.nan
    factor = 1 / n + test_share / (1 - test_share)
    return float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) * math.sqrt(factor))
