# SPDX-License-Identifier: Apache-2.0
"""Losses of tokens and their gradient, with a whole row in registers."""

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
    sum_three,
    sum_two,
)


@triton.jit(do_not_specialize=["rows", "t_rows", "stride_index", "stride_coefficient"])
def loss_row_kernel(
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
    """losses[i] of z[i] + bias and t[index[i]]; dz[i] = coefficient[i] * its gradient.

    z and dz (rows, COLUMNS), columns of unit stride, dz may be z; bias (COLUMNS,) or None; t
    (t_rows, COLUMNS), any strides; index (rows,) or None; losses (rows,); coefficient (rows,).
    dz may be None: losses alone. partials (programs, COLUMNS), or None: each program's column sums
    of dz. COLUMNS <= BLOCK_N.

    Grid: (programs,). Program k takes the rows k, k + programs, ..., and reads each once. No column
    is in two warps, or dz could be written before another warp has read z there.
    """
    program = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < COLUMNS
    if partials_ptr is not None:
        sums = tl.zeros([BLOCK_N], STAT)

    for row in range(program, rows, tl.num_programs(0)):
        t_row = rows_at(index_ptr, stride_index, row, True, t_rows)
        offs_t = t_row * stride_t + offs_n.to(tl.int64) * stride_t_column
        z = tl.load(z_ptr + row * stride_z + offs_n, mask=mask_n, other=0).to(STAT)  # [BLOCK_N]
        t = tl.load(t_ptr + offs_t, mask=mask_n, other=0).to(STAT)  # [BLOCK_N]
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0).to(STAT)  # [BLOCK_N]

        p, q, scale, short = z, t, 1.0, False
        if NORMALIZE == "l2":
            z_squares, t_squares = sum_two(z * z, t * t)
            z_norm, t_norm = tl.sqrt(z_squares), tl.sqrt(t_squares)
            scale, short = scale_of_norm(z_norm, EPS), z_norm < EPS
            p, q = z * scale, t * scale_of_norm(t_norm, EPS)
        elif NORMALIZE == "layer":
            z_sum, t_sum = sum_two(z, t)
            p = tl.where(mask_n, z - z_sum / COLUMNS, 0.0)
            q = tl.where(mask_n, t - t_sum / COLUMNS, 0.0)
            p_squares, q_squares = sum_two(p * p, q * q)
            scale = scale_of_deviation(p_squares, COLUMNS, EPS)
            p, q = p * scale, q * scale_of_deviation(q_squares, COLUMNS, EPS)

        terms, dp = loss_terms(p, q, LOSS), loss_slope(p, q, COLUMNS, LOSS)
        dp_sum, p_dp_sum = 0.0, 0.0
        if dz_ptr is None or NORMALIZE == "none":
            total = tl.sum(terms)
        elif NORMALIZE == "l2":
            total, p_dp_sum = sum_two(terms, p * dp)
        else:
            total, dp_sum, p_dp_sum = sum_three(terms, dp, p * dp)
        tl.store(losses_ptr + row, loss_of_sum(total, COLUMNS, LOSS))

        if dz_ptr is not None:
            mean, along = 0.0, 0.0
            if NORMALIZE != "none":
                mean, along = projection(total, dp_sum, p_dp_sum, short, COLUMNS, LOSS, NORMALIZE)
            coefficient = tl.load(coefficient_ptr + row * stride_coefficient).to(STAT)
            dz = project(p, dp, mean, along, scale, NORMALIZE) * coefficient
            tl.store(dz_ptr + row * stride_dz + offs_n, dz, mask=mask_n)
            if partials_ptr is not None:
                sums += dz

    if partials_ptr is not None:
        tl.store(partials_ptr + program * COLUMNS + offs_n, sums, mask=mask_n)
