# SPDX-License-Identifier: Apache-2.0
"""Identities that add something to the graph of what a model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def use(hidden: Tensor, *parameters: Tensor) -> Tensor:
    """`hidden`, with the parameters in its graph, but without a gradient for them.

    DDP looks in the graph of the model's result for the parameters that a step uses. The tap puts a
    head's parameters there. With level="global" the result need not depend on them otherwise.
    """
    return _Identity.apply(False, hidden, *parameters)


def carry_along(returned: Tensor, *tapped: Tensor) -> Tensor:
    """`returned`, whose backward also reaches the taps behind `tapped`, without a gradient."""
    return _Identity.apply(True, returned, *tapped)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, always: bool, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        same = x.view_as(x)
        if not always and not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(same)
        return same

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, gradient, *[None] * ctx.others)
