# SPDX-License-Identifier: Apache-2.0
"""Fused matmuls of the backward pass: d W and act'(u), d W and the scatter into dh."""

import triton
import triton.language as tl

from prereg_kernels.ops.backends.triton.activation import activation_gradient
from prereg_kernels.ops.backends.triton.fused.matmul import (
    column_parts,
    row_numbers,
    tile_position,
    tile_product,
)


@triton.jit(do_not_specialize=["M"])
def linear_backward_activation_kernel(
    d_desc,
    w_desc,
    u_desc,
    du_desc,
    partials_ptr,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """du = (d W) * act'(u), and its column sums, a row block at a time.

    d (M, K), W (K, N), u and du (M, N) in blocks of [BLOCK_M, BLOCK_N // PARTS]; partials (row
    blocks, N), float32, or None.

    Grid: (programs,), any number of them.
    """
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=FLATTEN
    ):
        row_block, column_block = tile_position(tile, row_blocks, column_blocks, GROUP_M)
        row, column = row_block * BLOCK_M, column_block * BLOCK_N
        product = tile_product(d_desc, w_desc, row, column, K, False, BLOCK_M, BLOCK_N, BLOCK_K)
        parts = column_parts(product, PARTS)
        for part in tl.static_range(PARTS):
            start = column + part * (BLOCK_N // PARTS)
            offs_n = start + tl.arange(0, BLOCK_N // PARTS)
            u = u_desc.load([row, start]).to(tl.float32)  # [BLOCK_M, BLOCK_N // PARTS]
            du = activation_gradient(parts[part], u, ACTIVATION)
            du_desc.store([row, start], du.to(du_desc.dtype))
            if partials_ptr is not None:
                sums_ptr = partials_ptr + row_block.to(tl.int64) * N
                tl.store(sums_ptr + offs_n, tl.sum(du, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["M"])
def linear_backward_scatter_kernel(
    d_desc,
    w_desc,
    into_ptr,
    index_ptr,
    scale_ptr,
    residual_ptr,
    stride_into,
    stride_residual,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """into[index] = scale * d W + residual[index], rounded once.

    d (M, K), W (K, N); into and residual (any, N), rows at index (M,), which are unique, or in
    order where it is None; scale (), or None; residual may be `into`, or None.

    Grid: (programs,), any number of them.
    """
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=FLATTEN
    ):
        row_block, column_block = tile_position(tile, row_blocks, column_blocks, GROUP_M)
        row, column = row_block * BLOCK_M, column_block * BLOCK_N
        product = tile_product(d_desc, w_desc, row, column, K, False, BLOCK_M, BLOCK_N, BLOCK_K)

        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = row_numbers(index_ptr, offs_m, mask_m)
        parts = column_parts(product, PARTS)
        for part in tl.static_range(PARTS):
            offs_n = column + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
            mask = mask_m[:, None] & (offs_n < N)[None, :]
            dh = parts[part] * scale  # [BLOCK_M, BLOCK_N // PARTS]
            if residual_ptr is not None:
                residual = residual_ptr + (rows * stride_residual)[:, None] + offs_n[None, :]
                dh += tl.load(residual, mask=mask, other=0).to(tl.float32)
            into = into_ptr + (rows * stride_into)[:, None] + offs_n[None, :]
            tl.store(into, dh.to(into_ptr.dtype.element_ty), mask=mask)
