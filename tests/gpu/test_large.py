# SPDX-License-Identifier: Apache-2.0
"""More than 2**31 elements: the rows at the far end against the same rows by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap
from tests.gpu.support import DEVICE, each_backend, needs_gpu
from tests.helpers import relative_error

COLUMNS, ROWS, END = 4096, 600_000, 500
NEEDED = 40 * 2**30  # bytes: hidden, anchor, the gradient and what the pipeline adds
pytestmark = needs_gpu


@pytest.fixture(scope="module")
def tensors() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """hidden and anchor (N, D), and the index of every row, from the last to the first."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip("needs 40 GiB of free GPU memory")
    assert ROWS * COLUMNS > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (ROWS, COLUMNS)
    hidden, anchor = (
        torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(2)
    )
    index = torch.arange(ROWS, device=DEVICE).flip(0)
    yield hidden, anchor, index
    del hidden, anchor, index
    torch.cuda.empty_cache()


def ends(x: Tensor) -> Tensor:
    return torch.cat([x[:END], x[-END:]])


@each_backend
@pytest.mark.parametrize("indexed", (False, True))
@pytest.mark.parametrize("tapped", (False, True))
def test_rows_far_out(
    backend: str, tensors: tuple[Tensor, Tensor, Tensor], indexed: bool, tapped: bool
) -> None:
    hidden, anchor, index = tensors
    select = {"visual_index": index} if indexed else {}
    options = {"denominator": float(ROWS), "backend": backend} | select
    leaf = hidden.detach().requires_grad_()
    if tapped:
        loss = pre_tap(leaf, anchor, **options)[1]
    else:
        loss = fused_pre_loss(leaf, anchor, **options)
    [dh] = torch.autograd.grad(loss, [leaf])

    part = ends(hidden).requires_grad_()
    true = eager_pre_loss(part, ends(anchor), denominator=float(ROWS), upcast=torch.float64)
    [true_dh] = torch.autograd.grad(true, [part])
    assert relative_error(ends(dh), true_dh) < 0.01
    assert dh.isfinite().all()

    with torch.no_grad():
        losses = fused_pre_loss(hidden, anchor, reduction="none", backend=backend, **select)
        true_losses = eager_pre_loss(part, ends(anchor), reduction="none", upcast=torch.float64)
    losses = losses.flip(0) if indexed else losses
    assert relative_error(ends(losses), true_losses) < 0.01


@each_backend
def test_head(backend: str, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, anchor, index = tensors
    generator = torch.Generator(DEVICE).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        return x / shape[1] ** 0.5

    weights = [draw(256, COLUMNS), draw(COLUMNS, 256)]
    options = {"denominator": float(ROWS)}
    leaf = hidden.detach().requires_grad_()
    loss = fused_pre_loss(leaf, anchor, weights, visual_index=index, backend=backend, **options)
    [dh] = torch.autograd.grad(loss, [leaf])
    part = ends(hidden).requires_grad_()
    true = eager_pre_loss(part, ends(anchor), weights, upcast=torch.float64, **options)
    [true_dh] = torch.autograd.grad(true, [part])
    assert relative_error(ends(dh), true_dh) < 0.02
