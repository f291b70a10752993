# SPDX-License-Identifier: Apache-2.0
"""Means of groups of rows."""

from __future__ import annotations

import pytest
import torch

from prereg_kernels.checkup import pool


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    means, ids = pool(x, torch.tensor([7, 2, -1, 7]))
    assert ids.tolist() == [2, 7]
    assert torch.equal(means, torch.tensor([[3.0, 4.0], [4.0, 5.0]]))


@pytest.mark.parametrize(
    "dtype, pooled",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_summed_in_float64(dtype: torch.dtype, pooled: torch.dtype) -> None:
    x = torch.full((3000, 1), 0.1, dtype=dtype)
    means, _ = pool(x, torch.zeros(3000, dtype=torch.long))
    assert means.dtype == pooled
    assert float(means) == pytest.approx(float(x[0]), rel=1e-7)


def test_no_groups() -> None:
    means, ids = pool(torch.ones(2, 3), torch.tensor([-1, -1]))
    assert means.shape == (0, 3) and ids.shape == (0,)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"groups: expected shape \(2,\), got \(3,\)"):
        pool(torch.ones(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="features: expected finite"):
        pool(torch.ones(2, 3) / 0, torch.zeros(2, dtype=torch.long))
