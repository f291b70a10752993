# SPDX-License-Identifier: Apache-2.0
"""The products of the weight gradients, `a @ b` summed over chunks, and the dtypes they come in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def add_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype | None) -> Tensor:
    """total + a @ b, written over `total` if there is one.

    Args:
        wide: the dtype of the sum, float32 for operands of low precision; None: that of a and b,
            in which a single product is rounded once, as in eager autograd.
    """
    if wide is None or a.dtype == wide:
        return a @ b if total is None else total.addmm_(a, b)
    found = wide_products(a.device, a.dtype)
    if not found.product:
        # Rounding the product of each chunk would add up
        return add_product(total, a.to(wide), b.to(wide), None)
    if total is None:
        return torch.mm(a, b, out_dtype=wide)
    if found.sum:
        return torch.addmm(total, a, b, out_dtype=wide, out=total)
    return total.add_(torch.mm(a, b, out_dtype=wide))


class WideProducts(NamedTuple):
    """What a device does with 16-bit operands."""

    product: bool  # mm has a float32 result
    sum: bool  # addmm adds to one in place


NONE = WideProducts(False, False)
_found: dict[tuple[torch.device, torch.dtype, bool], WideProducts] = {}


def wide_products(device: torch.device, dtype: torch.dtype) -> WideProducts:
    """What the device has for 16-bit operands of this dtype: tried out once, none on CPUs.

    Releases of torch, CUDA and ROCm differ, and with `allow_fp16_accumulation` a float32 result of
    float16 operands raises. Nothing is tried while a CUDA graph is captured, which it would be a
    part of: without a call before, the operands are copied to float32 there.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return NONE
    settings = torch.backends.cuda.matmul
    in_half = dtype == torch.float16 and getattr(settings, "allow_fp16_accumulation", False)
    found = _found.get((device, dtype, in_half))
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return NONE
        found = _found[device, dtype, in_half] = _try_out(device, dtype)
    return found


def _try_out(device: torch.device, dtype: torch.dtype) -> WideProducts:
    """Does not wait for the device: what it does not do raises on the host."""
    a = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        total = torch.mm(a, a, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return NONE
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return WideProducts(True, False)
    return WideProducts(True, True)
