# SPDX-License-Identifier: Apache-2.0
"""Rows gathered by index, in another dtype."""

import triton
import triton.language as tl
from torch import Tensor

from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.launch import (
    index_stride,
    launch,
    row_block,
    rows_at,
    tiled,
)


@triton.jit(do_not_specialize=["rows", "source_rows", "stride_index"])
def gather_kernel(
    source_ptr,
    index_ptr,
    out_ptr,
    rows,
    columns,
    source_rows,
    stride_source,
    stride_source_column,
    stride_index,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[i, j] = source[index[i], j].

    source (source_rows, columns), any strides; index (rows,) or None; out (rows, columns), columns
    of unit stride.

    Grid: of `config.grid`.
    """
    offs_m = row_block() * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows
    mask = mask_m[:, None] & (offs_n < columns)[None, :]
    source_row = rows_at(index_ptr, stride_index, offs_m, mask_m, source_rows)
    column = offs_n.to(tl.int64) * stride_source_column
    source = source_ptr + source_row[:, None] * stride_source + column[None, :]
    value = tl.load(source, mask=mask)  # [BLOCK_M, BLOCK_N]
    tl.store(out_ptr + offs_m[:, None] * stride_out + offs_n[None, :], value, mask=mask)


def gather_rows(source: Tensor, index: Tensor | None, out: Tensor) -> None:
    """out (n, C) = source[index], source (any, C)."""
    rows, columns = out.shape
    blocks, variant = tiled(columns, source.stride(1))
    launch(
        gather_kernel, config.grid(rows, columns, blocks), variant,
        (source, index, out),
        (rows, columns, source.shape[0], *source.stride(), index_stride(index), out.stride(0)),
    )  # fmt: skip
