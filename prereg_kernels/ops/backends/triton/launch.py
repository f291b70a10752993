# SPDX-License-Identifier: Apache-2.0
"""How kernels are launched, and what several of them need."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.compiled import MOST_KEPT, Variant, keep, launch_compiled

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
HAS_PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    variant: Variant,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
) -> None:
    """Launch on the device of the first tensor, and on its current stream.

    tensors, numbers, the variant's constants: the kernel's parameters, in this order.
    Triton itself takes the current device. Products are not fused into sums, whatever this Triton's
    default is: so every one rounds as the interpreter does, and dz is exactly 0 where z = t.
    """
    first = tensors[0]
    assert first is not None
    device = first.get_device()
    if first.is_cuda and device != torch.cuda.current_device():
        with on_device_of(first):
            return launch(kernel, grid, variant, tensors, numbers)
    key = launch_compiled(kernel, grid, device, tensors, numbers, variant)
    if key is not None:
        compiled = kernel[grid](
            *tensors, *numbers, **variant.constants, num_warps=variant.num_warps,
            enable_fp_fusion=False, **compiler_options(variant.most_registers),
        )  # fmt: skip
        keep(key, compiled)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def compiler_options(most_registers: int | None) -> dict[str, Any]:
    """`tl.device_assert` is compiled in, without triton's checks of its own arithmetic.

    On NVIDIA an assertion takes a compare and up to 3 registers a row. On AMD it would need a
    service on the host, so that there an index out of range is undefined.
    """
    nvidia = torch.version.hip is None
    options: dict[str, Any] = {"debug": nvidia, "sanitize_overflow": False}
    return options | {"maxnreg": most_registers} if nvidia and most_registers else options


def stat_dtype(*dtypes: torch.dtype) -> Any:
    """In which elementwise work on them is done: float64 if one of them is, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


@lru_cache(maxsize=MOST_KEPT)
def tiled(
    columns: int, column_stride: int, *dtypes: torch.dtype, activation: str | None = None
) -> tuple[config.Tile, Variant]:
    """The blocks of an elementwise kernel, and its variant.

    dtypes: of the tensors that STAT follows, for a kernel that has it; activation: for one that has
    ACTIVATION.
    """
    blocks = config.tile(columns, column_stride)
    constants: dict[str, Any] = {} if activation is None else {"ACTIVATION": activation}
    if dtypes:
        constants["STAT"] = stat_dtype(*dtypes)
    return blocks, Variant(
        blocks.num_warps, **constants, BLOCK_M=blocks.block_m, BLOCK_N=blocks.block_n
    )


def index_stride(index: Tensor | None) -> int:
    return 0 if index is None else index.stride(0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere, where kernels are interpreted or compiled alone, a few."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def row_block():
    """Of a program in a grid of `config.grid`, int64."""
    return tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def rows_at(index_ptr, stride_index, offs_m, mask_m, count):
    """index[offs_m], int64, or offs_m without an index; asserts that it is in [0, count)."""
    rows = offs_m
    if index_ptr is not None:
        rows = tl.load(index_ptr + offs_m * stride_index, mask=mask_m, other=0)
        tl.device_assert((rows >= 0) & (rows < count), "visual_index out of range")
    return rows
