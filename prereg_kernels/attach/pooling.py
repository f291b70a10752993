# SPDX-License-Identifier: Apache-2.0
"""pool_images: the mean of each image's rows, in float32. Backward needs no activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prereg_kernels.ops.shares import sum_over
from prereg_kernels.ops.transforms import forgets_functions
from prereg_kernels.ops.versions import check_versions, versions_of

_CHUNK_ROWS = 4096  # converted to float32 at a time: 64 MiB at a width of 4096


def pool_images(
    x: Tensor, image_of_row: Tensor, images: int, *, index: Tensor | None = None, group: Any = None
) -> Tensor:
    """The mean of the rows of each image.

    Args:
        x: (..., D), of any floating dtype.
        image_of_row: (N,) int64 in [0, images), the image of each row.
        images: their number.
        index: (N,) int64, unique: which rows of the flattened `x` these are. None: all of them.
        group: a process group whose ranks have other rows of the same images. The means, and in
            backward the gradients, are over the rows of all ranks.

    Returns:
        (images, D), in the dtype of `x`, with zeros for an image without rows. Computed in float32,
        or in float64 for float64. Every run gives the same: the sums are matrix products, without
        atomics.
    """
    if forgets_functions():
        return _means(x, image_of_row, images, index, group)[0]
    return _Pool.apply(x, image_of_row, images, index, group)


def _means(
    x: Tensor, image_of_row: Tensor, images: int, index: Tensor | None, group: Any
) -> tuple[Tensor, Tensor]:
    """The means (images, D), in the dtype of `x`, and the rows' counts (images, 1), at least 1."""
    rows = x.reshape(-1, x.shape[-1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    numbers = torch.arange(images, device=x.device)
    sums = torch.zeros(images, rows.shape[1], dtype=dtype, device=x.device)
    counts = torch.zeros(images, 1, dtype=dtype, device=x.device)
    # Autocast would round the products to its own dtype.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, image_of_row.shape[0], _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            some = rows[part] if index is None else rows[index[part]]
            member = (numbers[:, None] == image_of_row[part]).to(dtype)  # (images, some rows)
            sums = sums + member @ some.to(dtype)
            counts = counts + member.sum(dim=1, keepdim=True)
    if group is not None:
        sum_over(group, [sums, counts])
    counts = counts.clamp_min(1)
    return (sums / counts).to(x.dtype), counts


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, image_of_row: Tensor, images: int, index: Tensor | None, group: Any
    ) -> Tensor:
        means, counts = _means(x, image_of_row, images, index, group)
        # On ctx, not by save_for_backward: no activation is among them, and what a checkpointed
        # layer saves has to be the same when backward runs it again, without the batch.
        ctx.constants = image_of_row, index, counts
        # Dynamo may trace this, and leave backward to eager code: then nothing is watched
        compiled = torch.compiler.is_compiling()
        ctx.versions = None if compiled else versions_of(image_of_row, index)
        ctx.shape, ctx.dtype, ctx.group = x.shape, x.dtype, group
        return means

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        image_of_row, index, counts = ctx.constants
        if ctx.versions is not None:
            check_versions(ctx.versions, ("image_of_row", "index"), image_of_row, index)
        each = gradient / counts
        if ctx.group is not None:  # a rank's loss may be of some of the images
            sum_over(ctx.group, [each])
        each = each.to(ctx.dtype)
        if index is not None:  # the rows of no image get a row of zeros, the last
            each = torch.cat((each, each.new_zeros(1, each.shape[1])))
            nowhere = index.new_full((ctx.shape[:-1].numel(),), -1)
            image_of_row = nowhere.index_copy_(0, index, image_of_row)
        return each[image_of_row].view(ctx.shape), None, None, None, None
