# SPDX-License-Identifier: Apache-2.0
"""The derivative of a formula by autograd, where autograd is off: within custom ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value_and_vjp(
    function: Callable[..., Tensor], x: Tensor, upstream: Tensor, *constants: Tensor
) -> tuple[Tensor, Tensor]:
    """function(x, *constants), and `upstream` times its derivative with respect to x.

    Not by torch.func: it refuses to run under saved-tensor hooks, such as activation checkpointing
    has, and compiled graphs switch it off.
    """
    with (
        torch.inference_mode(False),  # switches autograd on again within an op, too
        torch.enable_grad(),
        # What is saved here does not outlive the block: nothing for anybody's hooks
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        leaf = _ordinary(x.detach()).requires_grad_()
        value = function(leaf, *map(_ordinary, constants))
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        return value.detach(), gradient


def _ordinary(x: Tensor) -> Tensor:
    """A tensor that autograd takes, unlike one that inference mode made."""
    return x.clone() if x.is_inference() else x
