# SPDX-License-Identifier: Apache-2.0
"""The activations between the head's matrices: each a name and its definition in PyTorch.

An activation that is registered here works everywhere, as a loss does: see `losses.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.ops.formulas import Formula, Registry

ActivationName = Literal["gelu", "gelu_tanh", "silu", "relu"]
_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Activation(Formula):
    """`formula(u, **parameters)`, element by element.

    Attributes:
        into: a function of (u, g) for plain PyTorch, without parameters. It writes act(u) to g,
            which may be u.
        backward_into: a function of (dg, u) that writes dg * act'(u) over dg. Give both or
            neither. None leaves the derivative to autograd.

    Example:
        >>> from prereg_kernels.ops import Activation
        >>> square = Activation("square", torch.square)
        >>> PReHead(8, 6, activation=square)
        PReHead(weights=[(8, 8), (6, 8)], activation='square')
    """

    into: Callable[[Tensor, Tensor], object] | None = None
    backward_into: Callable[[Tensor, Tensor], object] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.into is None) != (self.backward_into is None):
            raise ValueError("into and backward_into: expected both or neither, got one")


ACTIVATIONS = Registry(Activation, "activation", tensors=1, reduces=False)


def register_activation(activation: Activation) -> Activation:
    """Make an activation known by its name, for `activation=` and for files that name it.

    Args:
        activation: its formula is tried out on a few numbers.

    Returns:
        The activation, which `activation=` takes too.

    Raises:
        ValueError: the name belongs to another formula, or the formula changes the shape.

    Example:
        >>> from prereg_kernels.ops import Activation, register_activation
        >>> register_activation(Activation("squared_relu", lambda u: u.relu().square())).text
        'squared_relu'
    """
    return ACTIVATIONS.register(activation)


register_activation(
    Activation(
        "gelu",
        F.gelu,
        into=lambda u, g: _aten.gelu.out(u, approximate="none", out=g),
        backward_into=lambda dg, u: _aten.gelu_backward.grad_input(
            dg, u, approximate="none", grad_input=dg
        ),
    )
)
register_activation(
    Activation(
        "gelu_tanh",
        partial(F.gelu, approximate="tanh"),
        into=lambda u, g: _aten.gelu.out(u, approximate="tanh", out=g),
        backward_into=lambda dg, u: _aten.gelu_backward.grad_input(
            dg, u, approximate="tanh", grad_input=dg
        ),
    )
)
register_activation(
    Activation(
        "silu",
        F.silu,
        into=lambda u, g: _aten.silu.out(u, out=g),
        backward_into=lambda dg, u: _aten.silu_backward.grad_input(dg, u, grad_input=dg),
    )
)
register_activation(
    Activation(
        "relu",
        F.relu,
        into=lambda u, g: torch.clamp_min(u, 0, out=g),
        backward_into=lambda dg, u: _aten.threshold_backward.grad_input(dg, u, 0, grad_input=dg),
    )
)
