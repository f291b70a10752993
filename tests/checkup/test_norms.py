# SPDX-License-Identifier: Apache-2.0
"""Norms and massive activations on cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from prereg_kernels.checkup import MassiveDimension, Norms, NormSums, token_norms


def test_norms_by_hand() -> None:
    got = token_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, -2.0], [36.0, 0.0]]))
    assert got.mean == pytest.approx((5 + 1 + 2 + 36) / 4)
    assert got.median == pytest.approx(3.5)
    assert got.largest == pytest.approx(36)
    assert got.outliers == 0.25  # 36 > 35
    assert token_norms(torch.tensor([[5.0], [1.0], [2.0]])).median == 2.0


def test_massive_activations_by_hand() -> None:
    x = torch.full((10, 5), 0.5)
    x[:, 1] = -0.5
    x[0, 3], x[1, 3] = -900.0, 600.0  # above 100, and above 1,000 x 0.5
    x[2, 2] = 501.0
    x[3, 4] = 500.0  # not above
    x[4] = 0.01
    x[4, 1], x[4, 2] = 101.0, 99.0  # 9,900 times the median, but not above 100
    x[5, 0] = 502.0
    x[6] = 10.0
    x[6, 3] = 5000.0  # 500 times its median
    expected = (
        MassiveDimension(3, 2, 900.0),
        MassiveDimension(0, 1, 502.0),
        MassiveDimension(2, 1, 501.0),
        MassiveDimension(1, 1, 101.0),
    )
    got = token_norms(x)
    assert got.massive == 0.5
    assert got.massive_dimensions == expected
    one_by_one = NormSums()
    for row in x.split(1):
        one_by_one.update(row)
    assert one_by_one.result() == got
    parts = [NormSums().update(rows) for rows in x.split(2)]
    assert got == Norms.of(
        torch.cat([part.norms for part in parts]),
        sum(part.massive_tokens for part in parts),
        [found for part in parts for found in part.dimensions],
    )


def test_tokens_are_counted_once() -> None:
    x = torch.full((4, 9), 0.1)
    x[0, :2] = 1000.0
    got = token_norms(x)
    assert got.massive == 0.25
    assert [found.dimension for found in got.massive_dimensions] == [0, 1]


def test_the_median_of_an_even_number_of_dimensions() -> None:
    # magnitudes 0, 0.2, 0.3, 260: the median is 0.25, the threshold 250
    got = token_norms(torch.tensor([[0.0, 0.2, -0.3, 260.0]]))
    assert got.massive == 1.0
    assert token_norms(torch.tensor([[0.0, 0.2, -0.3, 249.0]])).massive == 0.0


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="features: expected at least 1 row in all, got 0"):
        token_norms(torch.ones(0, 3))
