# SPDX-License-Identifier: Apache-2.0
"""Losses of tokens and their gradient, for rows too long for registers: in blocks of columns."""

import triton
import triton.language as tl

from prereg_kernels.ops.backends.triton.launch import rows_at
from prereg_kernels.ops.backends.triton.loss_math import (
    loss_of_sum,
    loss_slope,
    loss_terms,
    project,
    projection,
    scale_of_deviation,
    scale_of_norm,
)


@triton.jit
def load_block(
    z_row_ptr,
    bias_ptr,
    t_row_ptr,
    stride_t_column,
    offs_n,
    mask_n,
    STAT: tl.constexpr,
):
    """z + bias and t in these columns, 0 where masked."""
    offs_t = offs_n.to(tl.int64) * stride_t_column
    z = tl.load(z_row_ptr + offs_n, mask=mask_n, other=0).to(STAT)  # [BLOCK_N]
    t = tl.load(t_row_ptr + offs_t, mask=mask_n, other=0).to(STAT)  # [BLOCK_N]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0).to(STAT)  # [BLOCK_N]
    return z, t


@triton.jit(do_not_specialize=["rows", "t_rows", "stride_index", "stride_coefficient"])
def loss_blocks_kernel(
    z_ptr,
    bias_ptr,
    t_ptr,
    index_ptr,
    coefficient_ptr,
    losses_ptr,
    dz_ptr,
    partials_ptr,
    rows,
    t_rows,
    stride_z,
    stride_t,
    stride_t_column,
    stride_index,
    stride_coefficient,
    stride_dz,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    LOSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As `loss_row_kernel`, but for any number of columns.

    A row is read for its normalisation (layer: its means first), for the sums over p and q, and for
    dz: from memory once, then from the caches. `partials` are summed up in place, each element by
    one thread.

    Grid: (programs,). Program k takes the rows k, k + programs, ...
    """
    program = tl.program_id(0).to(tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        z_row_ptr = z_ptr + row * stride_z
        t_row_ptr = t_ptr + rows_at(index_ptr, stride_index, row, True, t_rows) * stride_t

        z_shift, t_shift, z_scale, t_scale, short = 0.0, 0.0, 1.0, 1.0, False
        if NORMALIZE == "layer":
            z_sum, t_sum = tl.zeros([BLOCK_N], STAT), tl.zeros([BLOCK_N], STAT)
            for start in range(0, COLUMNS, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                mask_n = offs_n < COLUMNS
                z, t = load_block(
                    z_row_ptr, bias_ptr, t_row_ptr, stride_t_column, offs_n, mask_n, STAT
                )
                z_sum += z
                t_sum += t
            z_shift, t_shift = tl.sum(z_sum) / COLUMNS, tl.sum(t_sum) / COLUMNS
        if NORMALIZE != "none":
            z_squares, t_squares = tl.zeros([BLOCK_N], STAT), tl.zeros([BLOCK_N], STAT)
            for start in range(0, COLUMNS, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                mask_n = offs_n < COLUMNS
                z, t = load_block(
                    z_row_ptr, bias_ptr, t_row_ptr, stride_t_column, offs_n, mask_n, STAT
                )
                z = tl.where(mask_n, z - z_shift, 0.0)
                t = tl.where(mask_n, t - t_shift, 0.0)
                z_squares += z * z
                t_squares += t * t
            if NORMALIZE == "l2":
                z_norm, t_norm = tl.sqrt(tl.sum(z_squares)), tl.sqrt(tl.sum(t_squares))
                z_scale, t_scale = scale_of_norm(z_norm, EPS), scale_of_norm(t_norm, EPS)
                short = z_norm < EPS
            else:
                z_scale = scale_of_deviation(tl.sum(z_squares), COLUMNS, EPS)
                t_scale = scale_of_deviation(tl.sum(t_squares), COLUMNS, EPS)

        terms = tl.zeros([BLOCK_N], STAT)
        dp_sum, p_dp_sum = tl.zeros([BLOCK_N], STAT), tl.zeros([BLOCK_N], STAT)
        for start in range(0, COLUMNS, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < COLUMNS
            z, t = load_block(z_row_ptr, bias_ptr, t_row_ptr, stride_t_column, offs_n, mask_n, STAT)
            p = tl.where(mask_n, (z - z_shift) * z_scale, 0.0)
            q = tl.where(mask_n, (t - t_shift) * t_scale, 0.0)
            terms += loss_terms(p, q, LOSS)
            if dz_ptr is not None and NORMALIZE != "none":
                dp = loss_slope(p, q, COLUMNS, LOSS)
                dp_sum += dp
                p_dp_sum += p * dp
        total = tl.sum(terms)
        tl.store(losses_ptr + row, loss_of_sum(total, COLUMNS, LOSS))

        if dz_ptr is not None:
            mean, along = projection(
                total, tl.sum(dp_sum), tl.sum(p_dp_sum), short, COLUMNS, LOSS, NORMALIZE
            )
            coefficient = tl.load(coefficient_ptr + row * stride_coefficient).to(STAT)
            for start in range(0, COLUMNS, BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                mask_n = offs_n < COLUMNS
                z, t = load_block(
                    z_row_ptr, bias_ptr, t_row_ptr, stride_t_column, offs_n, mask_n, STAT
                )
                p, q = (z - z_shift) * z_scale, (t - t_shift) * t_scale
                dp = loss_slope(p, q, COLUMNS, LOSS)
                dz = project(p, dp, mean, along, z_scale, NORMALIZE) * coefficient
                tl.store(dz_ptr + row * stride_dz + offs_n, dz, mask=mask_n)
                if partials_ptr is not None:
                    partials = partials_ptr + program * COLUMNS + offs_n
                    first = row == program
                    before = tl.load(partials, mask=mask_n & (not first), other=0)  # [BLOCK_N]
                    tl.store(partials, before + dz, mask=mask_n)
