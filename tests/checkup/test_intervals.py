# SPDX-License-Identifier: Apache-2.0
"""Intervals against formulas, and how often they cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t

from prereg_kernels.checkup.intervals import Bootstrap, Estimate, Sums, over_splits


def ratio(sums: Sums) -> np.ndarray:
    return sums["a"] / sums["n"]


def test_the_value_is_that_of_all_images() -> None:
    a, n = np.array([[1.0, 4.0], [2.0, 8.0], [9.0, 0.0]]), np.array([[1.0, 2], [2, 2], [3, 2]])
    found = Bootstrap(3).estimate({"a": a, "n": n}, ratio)
    assert [x.value for x in found] == [2.0, 2.0]
    assert all(x.low <= x.value <= x.high for x in found)


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap(60)
    covered = 0
    for _ in range(200):
        n = rng.integers(1, 9, (60, 1)).astype(float)
        a = n * (0.3 + rng.normal(0, 1, (60, 1)))  # patches of an image go together
        x = bootstrap.estimate({"a": a, "n": n}, ratio)[0]
        covered += x.low <= 0.3 <= x.high
    assert 180 <= covered <= 198  # 95% of 200, and the percentile method is a little narrow


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(0, 5, (50, 1))  # what an image does to both models
    sums = {"x": image, "y": image + 0.1 + rng.normal(0, 0.01, (50, 1)), "n": np.ones((50, 1))}
    bootstrap = Bootstrap(50)
    apart = bootstrap.estimate(sums, lambda s: (s["y"] - s["x"]) / s["n"])[0]
    alone = bootstrap.estimate(sums, lambda s: s["x"] / s["n"])[0]
    assert apart.direction == 1 and apart.high - apart.low < 0.01
    assert alone.direction == 0 and alone.high - alone.low > 1


def test_no_interval_where_nothing_is_known() -> None:
    one = Bootstrap(1).estimate({"a": np.ones((1, 1)), "n": np.ones((1, 1))}, ratio)[0]
    assert one.value == 1 and math.isnan(one.low) and one.direction == 0
    rare = {"a": np.eye(5, 1), "n": np.eye(5, 1)}  # a third of the draws miss the only pair
    found = Bootstrap(5).estimate(rare, ratio)[0]
    assert found.value == 1 and math.isnan(found.low) and math.isnan(found.high)


def test_splits_share_rows() -> None:
    values = [0.8, 0.9, 0.85, 0.7]
    found = over_splits(values, 0.2)
    half = t.ppf(0.975, 3) * np.std(values, ddof=1) * math.sqrt(1 / 4 + 0.2 / 0.8)
    assert found.value == pytest.approx(0.8125)
    assert (found.low, found.high) == pytest.approx((0.8125 - half, 0.8125 + half))
    assert math.isnan(over_splits([0.5], 0.2).low)


@pytest.mark.parametrize(
    ("low", "high", "direction"),
    [(0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.1, 0), (math.nan, math.nan, 0), (0, 0, 0)],
)
def test_direction(low: float, high: float, direction: int) -> None:
    assert Estimate(0.1, low, high).direction == direction
