"""The activations and their derivatives, with the bias before and its gradient after them.

    gelu: u Phi(u)      gelu_tanh: u sigmoid(2 v), v = sqrt(2 / pi) (u + 0.044715 u^3)
    silu: u sigmoid(u)  relu: max(u, 0)

(1 + tanh(v)) / 2 = sigmoid(2 v).
"""

import triton
import triton.language as tl
from torch import Tensor

from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.launch import launch, stat_dtype
from prereg_kernels.ops.backends.triton.sums import add_partials


@triton.jit
def activated(u, ACTIVATION: tl.constexpr):
    """act(u). A NaN stays one."""
    if ACTIVATION == "gelu":
        g = u * (0.5 * (1 + tl.erf(u * 0.7071067811865476)))
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
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
        du = dg * (0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * density)
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

    Grid: (row blocks, column blocks).
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
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

    Grid: (programs, column blocks). Program k takes the row blocks k, k + programs, ...
    """
    program = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n).to(STAT)[None, :]  # [1, BLOCK_N]
    if partials_ptr is not None:
        sums = tl.zeros([BLOCK_M, BLOCK_N], STAT)

    for start in range(program * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m < rows)[:, None] & mask_n[None, :]
        offs_dg = offs_m[:, None] * stride_dg + offs_n[None, :]
        offs_u = offs_m[:, None] * stride_u + offs_n[None, :]
        dg = tl.load(dg_ptr + offs_dg, mask=mask, other=0).to(STAT)  # [BLOCK_M, BLOCK_N]
        u = tl.load(u_ptr + offs_u, mask=mask, other=0).to(STAT)  # [BLOCK_M, BLOCK_N]
        if bias_ptr is not None:
            u += bias
        du = activation_gradient(dg, u, ACTIVATION)
        tl.store(dg_ptr + offs_dg, du, mask=mask)
        if partials_ptr is not None:
            sums += du  # 0 outside, as dg is

    if partials_ptr is not None:
        tl.store(partials_ptr + program * columns + offs_n, tl.sum(sums, axis=0), mask=mask_n)


def activate(u: Tensor, bias: Tensor | None, activation: str, g: Tensor) -> None:
    """g (n, M) = act(u + bias); g may be u."""
    rows, columns = u.shape
    blocks = config.tile(columns)
    grid = (config.cdiv(rows, blocks.block_m), config.cdiv(columns, blocks.block_n))
    launch(
        activate_kernel, grid, blocks.num_warps,
        u, bias, g, rows, columns, u.stride(0), g.stride(0),
        ACTIVATION=activation, STAT=stat_dtype(u), BLOCK_M=blocks.block_m, BLOCK_N=blocks.block_n,
    )  # fmt: skip


def activation_backward(
    dg: Tensor, u: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None
) -> None:
    """du (n, M) = dg * act'(u + bias), over dg; sums (M,) += its column sums."""
    rows, columns = dg.shape
    blocks = config.tile(columns)
    programs, partials = config.cdiv(rows, blocks.block_m), None
    if sums is not None:
        programs = config.programs_along_rows(rows, columns, blocks)
        partials = sums.new_empty(programs, columns)
    launch(
        activation_backward_kernel, (programs, config.cdiv(columns, blocks.block_n)),
        blocks.num_warps,
        dg, u, bias, partials, rows, columns, dg.stride(0), u.stride(0),
        ACTIVATION=activation, STAT=stat_dtype(u), BLOCK_M=blocks.block_m, BLOCK_N=blocks.block_n,
    )  # fmt: skip
    if sums is not None and partials is not None:
        add_partials(partials, sums)
