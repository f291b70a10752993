"""The products of the weight gradients, `a @ b` summed over chunks, and the dtypes they come in."""

from __future__ import annotations

import re

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
    if not has_wide_products(a.device):
        # Rounding the product of each chunk would add up
        return add_product(total, a.to(wide), b.to(wide), None)
    if total is None:
        return torch.mm(a, b, out_dtype=wide)
    if _adds_to_wide():
        return torch.addmm(total, a, b, out_dtype=wide, out=total)
    return total.add_(torch.mm(a, b, out_dtype=wide))


def has_wide_products(device: torch.device) -> bool:
    """Whether low-precision operands can have a float32 product: on CUDA, not on ROCm or CPUs."""
    return device.type == "cuda" and torch.version.hip is None


def _adds_to_wide() -> bool:
    """Whether addmm takes a float32 sum: before torch 2.11 its dtype had to be the operands'."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return found is not None and (int(found[1]), int(found[2])) >= (2, 11)
