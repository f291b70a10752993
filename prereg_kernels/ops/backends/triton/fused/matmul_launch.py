# SPDX-License-Identifier: Apache-2.0
"""The fused matmuls as functions of tensors: descriptors, partials and launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.triton import config as blocks
from prereg_kernels.ops.backends.triton.fused.matmul_backward import (
    linear_backward_activation_kernel,
    linear_backward_scatter_kernel,
)
from prereg_kernels.ops.backends.triton.fused.matmul_config import MatmulConfig
from prereg_kernels.ops.backends.triton.fused.matmul_forward import (
    combine_losses_kernel,
    linear_activate_kernel,
    linear_losses_kernel,
)
from prereg_kernels.ops.backends.triton.launch import on_device_of
from prereg_kernels.ops.backends.triton.sums import sum_partials
from prereg_kernels.ops.spec import Spec

COMBINED_ROWS = 32  # a program


def linear_activate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    u: Tensor,
    g: Tensor,
    config: MatmulConfig,
    multiprocessors: int,
) -> None:
    """u = x W^T + bias, g = act(u); g alone where u is g."""
    _launch(
        linear_activate_kernel, config, multiprocessors, x, g.shape[1],
        _left(x, config), _right(weight, True, config), bias, _part(u, config), _part(g, config),
        *g.shape, x.shape[1], ACTIVATION=activation, STORE_U=u is not g,
    )  # fmt: skip


def linear_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk: LossChunk,
    spec: Spec,
    config: MatmulConfig,
    multiprocessors: int,
) -> None:
    """The chunk's losses (n,), of x W^T + bias."""
    anchor, losses = chunk.anchor, chunk.losses
    rows, columns = x.shape[0], weight.shape[0]
    column_blocks = blocks.cdiv(columns, config.block_n)
    statistics = 3 if spec.loss == "cosine" else 1
    partials = losses.new_empty(statistics, column_blocks, rows)
    _launch(
        linear_losses_kernel, config, multiprocessors, x, columns,
        _left(x, config), _right(weight, True, config), bias, anchor, chunk.anchor_index,
        partials, anchor.stride(0), rows, columns, x.shape[1], LOSS=spec.loss,
    )  # fmt: skip
    with on_device_of(x):
        combine_losses_kernel[(blocks.cdiv(rows, COMBINED_ROWS),)](
            partials, losses, rows, COLUMNS=columns, COLUMN_BLOCKS=column_blocks, EPS=spec.eps,
            LOSS=spec.loss, BLOCK_M=COMBINED_ROWS, BLOCK_N=blocks.next_power_of_2(column_blocks),
            enable_fp_fusion=False,
        )  # fmt: skip


def linear_backward_activation(
    d: Tensor,
    weight: Tensor,
    u: Tensor,
    activation: str,
    du: Tensor,
    sums: Tensor | None,
    config: MatmulConfig,
    multiprocessors: int,
) -> None:
    """du = (d W) * act'(u); sums = its column sums."""
    rows, columns = du.shape
    partials = None
    if sums is not None:
        partials = sums.new_empty(blocks.cdiv(rows, config.block_m), columns)
    _launch(
        linear_backward_activation_kernel, config, multiprocessors, d, columns,
        _left(d, config), _right(weight, False, config), _part(u, config), _part(du, config),
        partials, rows, columns, d.shape[1], ACTIVATION=activation,
    )  # fmt: skip
    if sums is not None and partials is not None:
        sum_partials(partials, sums)


def linear_backward_scatter(
    d: Tensor,
    weight: Tensor,
    into: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    config: MatmulConfig,
    multiprocessors: int,
) -> None:
    """into[index] = scale * d W + residual[index]; residual may be `into`."""
    columns = weight.shape[1]
    _launch(
        linear_backward_scatter_kernel, config, multiprocessors, d, columns,
        _left(d, config), _right(weight, False, config), into, index, scale, residual,
        into.stride(0), 0 if residual is None else residual.stride(0),
        d.shape[0], columns, d.shape[1],
    )  # fmt: skip


def _launch(
    kernel: Any,
    config: MatmulConfig,
    multiprocessors: int,
    left: Tensor,
    columns: int,
    *args: Any,
    **constants: Any,
) -> None:
    """Launch for the product of (rows of `left`, columns), on its device and current stream.

    The descriptors are parameters by value: a CUDA graph keeps them.
    """
    programs = min(config.tiles(left.shape[0], columns), multiprocessors * config.programs)
    with on_device_of(left):
        kernel[(programs,)](
            *args, **constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, GROUP_M=config.group_m, PARTS=config.parts,
            FLATTEN=config.flatten, num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=config.max_registers, enable_fp_fusion=True,
        )  # fmt: skip


def _left(x: Tensor, config: MatmulConfig) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [config.block_m, config.block_k])


def _right(weight: Tensor, transposed: bool, config: MatmulConfig) -> TensorDescriptor:
    block = [config.block_n, config.block_k] if transposed else [config.block_k, config.block_n]
    return TensorDescriptor.from_tensor(weight, block)


def _part(x: Tensor, config: MatmulConfig) -> TensorDescriptor:
    """For what an epilogue reads and writes."""
    return TensorDescriptor.from_tensor(x, [config.block_m, config.block_n // config.parts])
