# SPDX-License-Identifier: Apache-2.0
"""The rows that an index leaves out, copied."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.launch import launch, tiled


@triton.jit(do_not_specialize=["rows"])
def copy_kernel(
    into_ptr,
    source_ptr,
    is_other_ptr,
    rows,
    columns,
    stride_source,
    stride_source_column,
    stride_into,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """into[i, j] = source[i, j], or 0 where source is None, for the rows with is_other[i].

    source (rows, columns), any strides; into (rows, columns), columns of unit stride; is_other
    (rows,), bool.

    Grid: (row blocks,). Most blocks have no such row: their programs read is_other and end.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = tl.load(is_other_ptr + offs_m, mask=offs_m < rows, other=0) != 0
    if tl.max(mask_m.to(tl.int32)) > 0:
        for start in range(0, columns, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask = mask_m[:, None] & (offs_n < columns)[None, :]
            into = into_ptr + offs_m[:, None] * stride_into + offs_n[None, :]
            value = tl.zeros([BLOCK_M, BLOCK_N], into_ptr.dtype.element_ty)
            if source_ptr is not None:
                column = offs_n.to(tl.int64) * stride_source_column
                source = source_ptr + offs_m[:, None] * stride_source + column[None, :]
                value = tl.load(source, mask=mask)  # [BLOCK_M, BLOCK_N]
            tl.store(into, value, mask=mask)


def copy_others(into: Tensor, index: Tensor, source: Tensor | None) -> None:
    """into (T, C) = source (T, C), or 0, in the rows that are not in the index (N,)."""
    rows, columns = into.shape
    is_other = index.new_ones((rows,), dtype=torch.bool).index_fill_(0, index, False)
    blocks, variant = tiled(columns, 1 if source is None else source.stride(1))
    launch(
        copy_kernel, (config.cdiv(rows, blocks.block_m), 1, 1), variant,
        (into, source, is_other),
        (rows, columns, *(into if source is None else source).stride(), into.stride(0)),
    )  # fmt: skip
