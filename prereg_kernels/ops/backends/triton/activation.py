# SPDX-License-Identifier: Apache-2.0
"""The activations and their derivatives, with the bias before and its gradient after them.

    gelu: u Phi(u)      gelu_tanh: u sigmoid(2 v), v = sqrt(2 / pi) (u + 0.044715 u^3)
    silu: u sigmoid(u)  relu: max(u, 0)

(1 + tanh(v)) / 2 = sigmoid(2 v). Phi of the normal distribution, of density phi, is

    Phi(-|u|) = exp(-u^2 / 2) P(t) t, t = 1 / (1 + 0.35 |u|)

with the P of seven terms that comes closest, relatively, up to |u| = 6: to 2.4e-7. It takes half
the instructions of erf, shares its exponential with the density, and holds where 1 + erf cancels.
"""

import triton
import triton.language as tl
from torch import Tensor

from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.launch import (
    HAS_PTX,
    launch,
    multiprocessors,
    row_block,
    tiled,
)
from prereg_kernels.ops.backends.triton.sums import sum_partials


@triton.jit
def reciprocal(x):
    """1 / x for 1 <= x, float32: one instruction on NVIDIA's GPUs, right to its last place."""
    if HAS_PTX:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1 / x
    return inverse


@triton.jit
def normal(u):
    """Phi(u), and exp(-u^2 / 2), which is phi(u) sqrt(2 pi)."""
    bell = tl.exp2(u * u * -0.7213475204444817)
    if u.dtype == tl.float64:
        phi = 0.5 * (1 + tl.erf(u * 0.7071067811865476))
    else:
        t = reciprocal(tl.fma(tl.abs(u), 0.35, 1.0))
        p = tl.fma(t, 0.04731156655608712, -0.1950164730289079)
        p = tl.fma(p, t, 0.22778401333546547)
        p = tl.fma(p, t, -0.0045252688433332555)
        p = tl.fma(p, t, 0.1489392868923387)
        p = tl.fma(p, t, 0.1356268234753017)
        p = tl.fma(p, t, 0.13988017255235302)
        below = p * t * bell
        phi = tl.where(u < 0, below, 1 - below)
    return phi, bell


@triton.jit
def activated(u, ACTIVATION: tl.constexpr):
    """act(u). A NaN stays one."""
    if ACTIVATION == "gelu":
        phi, _ = normal(u)
        g = u * phi
    elif ACTIVATION == "gelu_tanh":
        g = u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    elif ACTIVATION == "silu":
        g = u * tl.sigmoid(u)
    else:
        g = tl.where(u < 0, 0.0, u)
    return g


@triton.jit
def activation_gradient(dg, u, ACTIVATION: tl.constexpr):
    """dg act'(u); act' of relu is 0 at 0, as in PyTorch."""
    if ACTIVATION == "gelu":
        phi, bell = normal(u)
        du = dg * tl.fma(u * 0.3989422804014327, bell, phi)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        du = dg * (s + u * s * (1 - s) * (1.5957691216057308 * (1 + 0.134145 * u * u)))
    elif ACTIVATION == "silu":
        s = tl.sigmoid(u)
        du = dg * (s * (1 + u * (1 - s)))
    else:
        du = tl.where(u <= 0, 0.0, dg)
    return du


@triton.jit(do_not_specialize=["rows"])
def activate_kernel(
    u_ptr,
    bias_ptr,
    g_ptr,
    rows,
    columns,
    stride_u,
    stride_g,
    ACTIVATION: tl.constexpr,
    STAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """g = act(u + bias).

    u and g (rows, columns), columns of unit stride, g may be u; bias (columns,) or None.

    Grid: of `config.grid`.
    """
    offs_m = row_block() * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    mask = (offs_m < rows)[:, None] & mask_n[None, :]
    offs_u = offs_m[:, None] * stride_u + offs_n[None, :]
    u = tl.load(u_ptr + offs_u, mask=mask).to(STAT)  # [BLOCK_M, BLOCK_N]
    if bias_ptr is not None:
        u += tl.load(bias_ptr + offs_n, mask=mask_n).to(STAT)[None, :]  # [BLOCK_N]
    g = activated(u, ACTIVATION)
    tl.store(g_ptr + offs_m[:, None] * stride_g + offs_n[None, :], g, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def activation_backward_kernel(
    dg_ptr,
    u_ptr,
    bias_ptr,
    partials_ptr,
    rows,
    columns,
    stride_dg,
    stride_u,
    ACTIVATION: tl.constexpr,
    STAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """du = dg * act'(u + bias), written over dg.

    dg and u (rows, columns), columns of unit stride; bias (columns,) or None; partials (programs,
    columns), or None: each program's column sums of du.

    Grid: (column blocks, programs). Program k takes the row blocks k, k + programs, ...
    """
    program = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n).to(STAT)[None, :]  # [1, BLOCK_N]
    if partials_ptr is not None:
        sums = tl.zeros([BLOCK_M, BLOCK_N], STAT)

    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_dg = offs_m[:, None] * stride_dg + offs_n[None, :]
    offs_u = offs_m[:, None] * stride_u + offs_n[None, :]
    for start in range(program * BLOCK_M, rows, tl.num_programs(1) * BLOCK_M):
        mask = (start + offs_m < rows)[:, None] & mask_n[None, :]
        at_dg = dg_ptr + start * stride_dg + offs_dg
        dg = tl.load(at_dg, mask=mask, other=0).to(STAT)  # [BLOCK_M, BLOCK_N]
        u = tl.load(u_ptr + start * stride_u + offs_u, mask=mask, other=0).to(STAT)
        if bias_ptr is not None:
            u += bias
        du = activation_gradient(dg, u, ACTIVATION)
        if partials_ptr is not None:
            sums += du  # 0 outside, as dg is
        tl.store(at_dg, du, mask=mask)

    if partials_ptr is not None:
        tl.store(partials_ptr + program * columns + offs_n, tl.sum(sums, axis=0), mask=mask_n)


def activate(u: Tensor, bias: Tensor | None, activation: str, g: Tensor) -> None:
    """g (n, M) = act(u + bias); g may be u."""
    rows, columns = u.shape
    blocks, variant = tiled(columns, 1, u.dtype, activation=activation)
    launch(
        activate_kernel, config.grid(rows, columns, blocks), variant,
        (u, bias, g), (rows, columns, u.stride(0), g.stride(0)),
    )  # fmt: skip


def activation_backward(
    dg: Tensor, u: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None
) -> None:
    """du (n, M) = dg * act'(u + bias), over dg; sums (M,) = its column sums."""
    rows, columns = dg.shape
    blocks, variant = tiled(columns, 1, u.dtype, activation=activation)
    programs, partials = config.cdiv(rows, blocks.block_m), None
    if sums is not None:
        programs = config.programs_along_rows(rows, columns, blocks, multiprocessors(dg.device))
        partials = sums.new_empty(programs, columns)
    launch(
        activation_backward_kernel, (config.cdiv(columns, blocks.block_n), programs, 1), variant,
        (dg, u, bias, partials), (rows, columns, dg.stride(0), u.stride(0)),
    )  # fmt: skip
    if sums is not None and partials is not None:
        sum_partials(partials, sums)
