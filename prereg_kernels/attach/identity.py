"""Identities that put something into the graph of what a model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def use(hidden: Tensor, *parameters: Tensor) -> Tensor:
    """`hidden`, whose graph reaches the parameters and has no gradient for them.

    DDP looks for what a step uses in the graph of what the model returns. The tap puts a head's
    parameters there; with level="global" nothing that is returned needs to depend on them.
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
