# SPDX-License-Identifier: Apache-2.0
"""What torch does with a function besides calling it: torch.func, forward mode, torch.export.

The fused loss has one derivative, in reverse mode. For any other derivative, torch treats what runs
below autograd as a constant. So each of them needs code of plain operations, or an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels._util import private

PLAIN = frozenset({Tensor, nn.Parameter})
"""The types of tensors whose operators do nothing of their own."""
_NOTHING: AbstractContextManager[Any] = nullcontext()


def is_transforming() -> bool:
    """Whether one of torch.func's transforms (grad, vmap, ...) or forward mode runs this code."""
    return private.is_functorch_active() or private.is_in_forward_mode()


def forgets_functions() -> bool:
    """Whether an autograd.Function is no way to have a derivative here: torch.export drops it."""
    return is_transforming() or torch.compiler.is_exporting()


def is_plain(*tensors: Tensor) -> bool:
    """Whether nobody but autograd looks at an op of these tensors: no graph, transform or mode.

    Nor a subclass of Tensor, or a profiler.
    """
    if torch.compiler.is_compiling() or forgets_functions():
        return False
    if private.dispatch_depth() or private.profiler_runs() or private.compiles_frames():
        return False
    return PLAIN.issuperset(map(type, tensors))


def without_grad() -> AbstractContextManager[Any]:
    """`torch.no_grad()`, at less cost where there is nothing to do, as in most backward passes."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


is_wrapped = private.is_functorch_wrapped
"""Whether a transform sees a tensor: under vmap its values are those of a whole batch."""


def forbid_forward_mode(*tensors: Tensor | None) -> None:
    """Raise if one of them carries a tangent, which an op below autograd would drop."""
    if private.is_in_forward_mode():  # else nothing does, and there is no call to pay for
        _ForbidForwardMode.apply(*[x for x in tensors if x is not None])


def forbid_double_backward(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients, such that differentiating them again raises instead of giving zeros.

    Args:
        inputs: all that the gradients depend on, the upstream gradients among them.
    """
    if not torch.is_grad_enabled():
        return gradients
    there = [x for x in gradients if x is not None]
    marked = list(_ForbidDoubleBackward.apply(len(there), *there, *inputs))
    return [None if x is None else marked.pop(0) for x in gradients]


class _Forbid(torch.autograd.Function):
    """In the form that torch.func takes, each level of its transforms by itself."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass


class _ForbidForwardMode(_Forbid):
    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(0) for x in tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise RuntimeError(
            "the PRe loss has no forward-mode derivative: torch.func.jvp, jacfwd, linearize and "
            "hessian, and torch.autograd.forward_ad, are supported by eager_pre_loss only"
        )


class _ForbidDoubleBackward(_Forbid):
    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "the PRe loss has no second derivative: double backward (create_graph=True followed "
            "by backward through the gradients) is supported by eager_pre_loss only"
        )
