# SPDX-License-Identifier: Apache-2.0
"""Fused matmuls of the forward pass: x W^T and the activation, x W^T and the tokens' losses."""

import triton
import triton.language as tl

from prereg_kernels.ops.backends.triton.activation import activated
from prereg_kernels.ops.backends.triton.fused.matmul import (
    column_parts,
    row_numbers,
    tile_position,
    tile_product,
)
from prereg_kernels.ops.backends.triton.loss_math import loss_terms


@triton.jit(do_not_specialize=["M"])
def linear_activate_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    u_desc,
    g_desc,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    STORE_U: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """u = x W^T + bias, stored if STORE_U, and g = act(u).

    x (M, K), W (N, K), bias (N,) or None, u and g (M, N) in blocks of [BLOCK_M, BLOCK_N // PARTS].

    Grid: (programs,), any number of them.
    """
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=FLATTEN
    ):
        row_block, column_block = tile_position(tile, row_blocks, column_blocks, GROUP_M)
        row, column = row_block * BLOCK_M, column_block * BLOCK_N
        product = tile_product(x_desc, w_desc, row, column, K, True, BLOCK_M, BLOCK_N, BLOCK_K)
        parts = column_parts(product, PARTS)
        for part in tl.static_range(PARTS):
            start = column + part * (BLOCK_N // PARTS)
            u = parts[part]  # [BLOCK_M, BLOCK_N // PARTS]
            if bias_ptr is not None:
                offs_n = start + tl.arange(0, BLOCK_N // PARTS)
                bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0)  # [BLOCK_N // PARTS]
                u += bias.to(tl.float32)[None, :]
            if STORE_U:
                u_desc.store([row, start], u.to(u_desc.dtype))
            g_desc.store([row, start], activated(u, ACTIVATION).to(g_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def linear_losses_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    t_ptr,
    index_ptr,
    partials_ptr,
    stride_t,
    M,
    N,
    K,
    LOSS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """What the losses need of a row of z = x W^T + bias and t, a column block at a time.

    cosine: z.t, |z|^2 and |t|^2; the others: the sum of the elements' losses.
    x (M, K), W (N, K), bias (N,) or None; t (any, N), rows at index (M,), or in order where it is
    None; partials (3 or 1, column blocks, M), float32.

    Grid: (programs,), any number of them.
    """
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=FLATTEN
    ):
        row_block, column_block = tile_position(tile, row_blocks, column_blocks, GROUP_M)
        row, column = row_block * BLOCK_M, column_block * BLOCK_N
        product = tile_product(x_desc, w_desc, row, column, K, True, BLOCK_M, BLOCK_N, BLOCK_K)

        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        t_row_ptr = t_ptr + row_numbers(index_ptr, offs_m, mask_m) * stride_t
        first = tl.zeros((BLOCK_M,), tl.float32)
        zz = tl.zeros((BLOCK_M,), tl.float32)
        tt = tl.zeros((BLOCK_M,), tl.float32)
        parts = column_parts(product, PARTS)
        for part in tl.static_range(PARTS):
            offs_n = column + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
            mask_n = offs_n < N
            z = parts[part]  # [BLOCK_M, BLOCK_N // PARTS]
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0)  # [BLOCK_N // PARTS]
                z += bias.to(tl.float32)[None, :]
            mask = mask_m[:, None] & mask_n[None, :]
            t = tl.load(t_row_ptr[:, None] + offs_n[None, :], mask=mask, other=0)
            t = t.to(tl.float32)  # [BLOCK_M, BLOCK_N // PARTS]
            # Beyond N both are zeros, which add nothing
            if LOSS == "cosine":
                first += tl.sum(z * t, axis=1)
                zz += tl.sum(z * z, axis=1)
                tt += tl.sum(t * t, axis=1)
            else:
                first += tl.sum(loss_terms(z, t, LOSS), axis=1)

        partials = partials_ptr + column_block.to(tl.int64) * M + offs_m
        tl.store(partials, first, mask=mask_m)
        if LOSS == "cosine":
            statistic = column_blocks.to(tl.int64) * M
            tl.store(partials + statistic, zz, mask=mask_m)
            tl.store(partials + 2 * statistic, tt, mask=mask_m)


@triton.jit(do_not_specialize=["M"])
def combine_losses_kernel(
    partials_ptr,
    losses_ptr,
    M,
    COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    EPS: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """losses (M,) of the partials of `linear_losses_kernel`, summed in a fixed order.

    cosine: -z.t / (max(|z|, eps) max(|t|, eps)); the others: the sum / COLUMNS.
    partials (3 or 1, COLUMN_BLOCKS, M); BLOCK_N is at least COLUMN_BLOCKS.

    Grid: (row blocks,).
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask = (offs_n < COLUMN_BLOCKS)[:, None] & mask_m[None, :]
    statistic = tl.cast(M, tl.int64) * COLUMN_BLOCKS
    partials = partials_ptr + offs_n.to(tl.int64)[:, None] * M + offs_m[None, :]
    losses = tl.sum(tl.load(partials, mask=mask, other=0), axis=0)  # [BLOCK_M]
    if LOSS == "cosine":
        zz = tl.sum(tl.load(partials + statistic, mask=mask, other=0), axis=0)  # [BLOCK_M]
        tt = tl.sum(tl.load(partials + 2 * statistic, mask=mask, other=0), axis=0)  # [BLOCK_M]
        z_norm, t_norm = tl.sqrt(zz), tl.sqrt(tt)
        losses = -losses / tl.where(z_norm < EPS, EPS, z_norm)
        losses = losses / tl.where(t_norm < EPS, EPS, t_norm)
    else:
        losses = losses / COLUMNS
    tl.store(losses_ptr + offs_m, losses, mask=mask_m)
