# SPDX-License-Identifier: Apache-2.0
"""Rows scattered by index, scaled, in another dtype."""

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


@triton.jit(do_not_specialize=["rows", "into_rows", "stride_index"])
def scatter_kernel(
    values_ptr,
    into_ptr,
    index_ptr,
    scale_ptr,
    residual_ptr,
    rows,
    columns,
    into_rows,
    stride_values,
    stride_into,
    stride_into_column,
    stride_residual,
    stride_residual_column,
    stride_index,
    STAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """into[index[i], j] = values[i, j] * scale + residual[index[i], j], rounded once.

    values (rows, columns), columns of unit stride; into and residual (into_rows, columns), any
    strides, residual may be `into` or None; index (rows,), unique, or None; scale (), or None.

    Grid: of `config.grid`. No atomics: an element belongs to one program.
    """
    offs_m = row_block() * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows
    mask = mask_m[:, None] & (offs_n < columns)[None, :]
    values = values_ptr + offs_m[:, None] * stride_values + offs_n[None, :]
    value = tl.load(values, mask=mask).to(STAT)  # [BLOCK_M, BLOCK_N]
    if scale_ptr is not None:
        value *= tl.load(scale_ptr).to(STAT)
    into_row = rows_at(index_ptr, stride_index, offs_m, mask_m, into_rows)
    column = offs_n.to(tl.int64) * stride_into_column
    into = into_ptr + into_row[:, None] * stride_into + column[None, :]
    if residual_ptr is not None:
        column = offs_n.to(tl.int64) * stride_residual_column
        residual = residual_ptr + into_row[:, None] * stride_residual + column[None, :]
        value += tl.load(residual, mask=mask).to(STAT)  # [BLOCK_M, BLOCK_N]
    tl.store(into, value, mask=mask)


def scatter_rows(
    values: Tensor,
    into: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> None:
    """into[index] = values * scale + residual[index]; values (n, C), into and residual (any, C)."""
    rows, columns = values.shape
    blocks, variant = tiled(columns, into.stride(1), values.dtype, into.dtype)
    launch(
        scatter_kernel, config.grid(rows, columns, blocks), variant,
        (values, into, index, scale, residual),
        (
            rows, columns, into.shape[0], values.stride(0), *into.stride(),
            *(into if residual is None else residual).stride(), index_stride(index),
        ),
    )  # fmt: skip
