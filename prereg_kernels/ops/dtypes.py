# SPDX-License-Identifier: Apache-2.0
"""The dtypes of a call: of the matmuls as the caller has them, as they run, and of the rest."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prereg_kernels._util import private

_NOTHING: AbstractContextManager[Any] = nullcontext()
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of row statistics, losses and everything elementwise, for matmuls in this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, at less cost where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the head's matmuls: autocast's where autocast is on, else that of `hidden`.

    As in torch itself, autocast leaves float64 alone.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Within, autocast leaves operands on the tensor's device alone."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the matmuls run: float32 where a CPU has no arithmetic of `dtype`.

    There, products of low precision are emulated: on a CPU with AVX2, 7 to 500 times slower than
    those of float32. The latter are also more precise.
    """
    emulated = device.type == "cpu" and dtype.itemsize == 2 and not _native_on_cpu(dtype)
    return torch.float32 if emulated else dtype


@cache
def _native_on_cpu(dtype: torch.dtype) -> bool:
    if dtype == torch.float16:
        return private.has_onednn_fp16()
    if not private.has_onednn_bf16():
        return False
    # x86: true with any AVX-512, but only these two have products of bfloat16
    return not private.has_avx2() or private.has_avx512_bf16() or private.has_amx_tiles()
