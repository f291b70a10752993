"""The derivative of a formula by autograd, where autograd is off: within custom ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_OFF = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)


def value_and_vjp(
    function: Callable[..., Tensor], x: Tensor, upstream: Tensor, *constants: Tensor
) -> tuple[Tensor, Tensor]:
    """function(x, *constants), and `upstream` times its derivative with respect to x.

    Not by torch.func: it refuses to run under saved-tensor hooks, such as activation checkpointing
    has, and compiled graphs switch it off.
    """
    with _autograd():
        leaf = _ordinary(x.detach()).requires_grad_()
        value = function(leaf, *map(_ordinary, constants))
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        return value.detach(), gradient


def _ordinary(x: Tensor) -> Tensor:
    """A tensor that autograd takes, unlike one that inference mode made."""
    return x.clone() if x.is_inference() else x


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd switched on, with nobody's hooks on what it saves: that does not leave the block."""
    below, view = (torch._C._SetExcludeDispatchKeyGuard(key, False) for key in _OFF)
    with (
        below, view, torch.inference_mode(False), torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):  # fmt: skip
        yield
