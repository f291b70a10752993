# SPDX-License-Identifier: Apache-2.0
"""The mean of each image's rows: against sums in float64, in every dtype, and its gradient."""

from __future__ import annotations

import pytest
import torch

from prereg_kernels.attach import pooling
from prereg_kernels.attach.pooling import pool_images
from tests.helpers import relative_error

SIZES = (3, 1, 4)
OF_ROW = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
INDEX = torch.tensor([1, 2, 3, 5, 8, 9, 10, 11])  # of 2 x 7 positions


def by_hand(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.mean(dim=0) for part in x.flatten(0, -2)[INDEX].split(SIZES)])


@pytest.mark.parametrize("chunk_rows", (1, 3, 4096))
@pytest.mark.parametrize(
    "dtype, bound",
    (
        (torch.float64, 1e-15),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-10),
    ),
    ids=repr,
)
def test_means_and_gradients(
    dtype: torch.dtype, bound: float, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "_CHUNK_ROWS", chunk_rows)
    generator = torch.Generator().manual_seed(0)
    x = (5 + torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)).to(dtype)
    truth, x = x.double().requires_grad_(), x.requires_grad_()
    weights = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = pool_images(x, OF_ROW, 3, index=INDEX), by_hand(truth)
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < bound
    (ours * weights.to(dtype)).sum().backward()
    (expected * weights.to(dtype)).sum().backward()
    assert relative_error(x.grad, truth.grad) < bound
    outside = [i for i in range(14) if i not in INDEX]
    assert x.grad.flatten(0, 1)[outside].count_nonzero() == 0


def test_all_rows() -> None:
    x = torch.arange(16.0).view(8, 2)
    assert pool_images(x, OF_ROW, 3).tolist() == [[2.0, 3.0], [6.0, 7.0], [11.0, 12.0]]


def test_other_rows_do_not_matter() -> None:
    x = torch.full((2, 7, 6), torch.nan).requires_grad_()
    x.data.view(14, 6)[INDEX] = 1.0
    means = pool_images(x, OF_ROW, 3, index=INDEX)
    means.sum().backward()
    assert torch.equal(means, torch.ones(3, 6)) and x.grad.isfinite().all()


def test_sums_beyond_the_range_of_float16() -> None:
    x = torch.full((600, 2), 1000.0, dtype=torch.float16)
    assert torch.equal(pool_images(x, torch.zeros(600, dtype=torch.long), 1), x[:1])


def test_no_images() -> None:
    x, none = torch.randn(2, 7, 6).requires_grad_(), torch.zeros(0, dtype=torch.long)
    means = pool_images(x, none, 0, index=none)
    assert means.shape == (0, 6)
    means.sum().backward()
    assert x.grad.count_nonzero() == 0


def test_an_image_without_rows() -> None:
    x = torch.randn(2, 6).requires_grad_()
    means = pool_images(x, torch.tensor([0, 2]), 3)
    assert torch.equal(means, torch.stack((x[0], torch.zeros(6), x[1])))
    means.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)
