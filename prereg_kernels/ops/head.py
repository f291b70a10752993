# SPDX-License-Identifier: Apache-2.0
"""PReHead: the predictor f of Predictive Regularization, an MLP that computes its own loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from prereg_kernels._util import distributed, fsdp, private
from prereg_kernels.ops.activations import ACTIVATIONS, Activation, ActivationName
from prereg_kernels.ops.loss import fused_pre_loss
from prereg_kernels.ops.options import LossOptions, TapOptions
from prereg_kernels.ops.tap import pre_tap


class PReHead(nn.Module):
    """An MLP from hidden states to anchors (the paper's: depth 2), whose forward is the PRe loss.

    Args:
        in_features: D, the width of the hidden states.
        out_features: A, the width of the anchor.
        hidden_features: M, the width in between. None: `in_features`.
        depth: how many matrices the head has. 0: no head, and then D == A.
        activation: "gelu", "gelu_tanh", "silu" or "relu", or an `Activation`, between the matrices.
        bias: whether every layer has a bias.
        seed: of the initialisation. It gives the same numbers on every device, and leaves torch's
            generators alone. None: torch's own generator, as for `nn.Linear`.
        device, dtype: of the parameters, as for `nn.Linear`, whose initialisation this uses.

    On the meta device the parameters have no values. When they leave it, or when `to_empty` leaves
    them without values, they are drawn, because no checkpoint of a plain model has them.

    The parameters belong to this module itself, not to submodules. FSDP and ZeRO gather a module's
    own parameters when its forward is called, and no submodule's forward would ever be called.

    Example:
        >>> head = PReHead(8, 6, seed=0)
        >>> [tuple(weight.shape) for weight in head.weights]
        [(8, 8), (6, 8)]
        >>> hidden, anchor = torch.ones(2, 5, 8), torch.ones(2, 5, 6)
        >>> loss = head(hidden, anchor, visual_mask=torch.ones(2, 5, dtype=torch.bool))
        >>> loss.backward()
        >>> head.weights[0].grad.shape
        torch.Size([8, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int | None = None,
        *,
        depth: int = 2,
        activation: ActivationName | Activation = "gelu",
        bias: bool = True,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = in_features if hidden_features is None else hidden_features
        for name, value, least in (
            ("in_features", in_features, 1),
            ("out_features", out_features, 1),
            ("hidden_features", hidden_features, 1),
            ("depth", depth, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if isinstance(seed, bool) or not (seed is None or (isinstance(seed, int) and seed >= 0)):
            raise ValueError(f"seed: expected None or an integer of at least 0, got {seed!r}")
        if depth == 0 and in_features != out_features:
            raise ValueError(
                f"depth: 0 needs in_features == out_features, got {in_features} and {out_features}"
            )
        self.activation, self.depth, self.seed = ACTIVATIONS.text_of(activation), depth, seed
        self._waiting: Mapping[str, Tensor] | None = None
        self.home = fsdp.Home(None)
        widths = [in_features, *[hidden_features] * (depth - 1), out_features][: depth + 1]
        for layer in range(depth):
            shape = (widths[layer + 1], widths[layer])
            weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(f"weight_{layer}", weight)
            vector = torch.empty(shape[0], device=device, dtype=dtype)
            self.register_parameter(f"bias_{layer}", nn.Parameter(vector) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, uniformly in +-1/sqrt(in_features) as `nn.Linear` does.

        With a seed the numbers are the same each time. If `fill` gave values while there was no
        memory for them, the parameters get these values instead.
        """
        if self._waiting is not None:
            self.fill(self._waiting)
            return
        generator = None if self.seed is None else torch.Generator("cpu").manual_seed(self.seed)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(weight.shape[1])
            for parameter in (weight, bias):
                if parameter is None:
                    continue
                if generator is None:
                    nn.init.uniform_(parameter, -bound, bound)
                else:
                    whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                    whole.uniform_(-bound, bound, generator=generator)
                    distributed.fill(parameter, whole, same_everywhere=True)

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy whole parameters in, by name. On the meta device that waits until they leave it."""
        self._waiting = values if self._is_meta() else None
        for name, parameter in self.named_parameters(recurse=False):
            distributed.fill(parameter, values[name])

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module's; and what FSDP has sharded is one unit with the model, or an error.

        A property would tell as much, but Dynamo reads the attribute without calling one.
        """
        super().__setattr__(name, value)
        if name != private.FSDP_MANAGED:
            return
        is_sharded = any(map(distributed.is_sharded, self.parameters(recurse=False)))
        if is_sharded and self.home.model is not None:
            fsdp.check_unit(self.home.model, self)

    def _is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.parameters(recurse=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PReHead:
        was_meta = self._is_meta()
        super()._apply(fn, recurse)
        if not self._is_meta() and (was_meta or not _keeps_values(fn)):
            self.reset_parameters()
        return self

    @property
    def weights(self) -> list[Tensor]:
        """The matrices, (out, in) each, first layer first."""
        return [getattr(self, f"weight_{layer}") for layer in range(self.depth)]

    @property
    def biases(self) -> list[Tensor | None]:
        """The biases, (out,) or None each, first layer first."""
        return [getattr(self, f"bias_{layer}") for layer in range(self.depth)]

    def forward(self, hidden: Tensor, anchor: Tensor, *, tap: bool = False, **options: Any) -> Any:
        """`fused_pre_loss` with this head's parameters, or `pre_tap` if `tap`.

        Args:
            hidden, anchor, options: as for those functions, without weights, biases, activation.
        """
        if any(weight.is_meta for weight in self.weights) and not hidden.is_meta:
            raise ValueError(
                "head: its parameters are on the meta device and have no values; call "
                f"to_empty(device={str(hidden.device)!r}) on the head, or on the model before its "
                "weights are loaded: that draws them"
            )
        function = pre_tap if tap else fused_pre_loss
        activation = cast(ActivationName, self.activation)  # or the text of another
        return function(hidden, anchor, self.weights, self.biases, activation=activation, **options)

    if TYPE_CHECKING:  # nn.Module says that a call takes and returns anything

        @overload
        def __call__(
            self,
            hidden: Tensor,
            anchor: Tensor,
            *,
            tap: Literal[False] = False,
            **options: Unpack[LossOptions],
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            hidden: Tensor,
            anchor: Tensor,
            *,
            tap: Literal[True],
            **options: Unpack[TapOptions],
        ) -> tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def tap(
        self, hidden: Tensor, anchor: Tensor, **options: Unpack[TapOptions]
    ) -> tuple[Tensor, Tensor]:
        """`pre_tap` with this head's parameters, called as the module so that its hooks run.

        Example:
            >>> head, hidden = PReHead(8, 8, depth=0), torch.ones(4, 8, requires_grad=True)
            >>> tapped, loss = head.tap(hidden, torch.zeros(4, 8), loss="mse", compute_value=True)
            >>> loss.item()
            1.0
            >>> torch.equal(tapped, hidden)
            True
        """
        return self(hidden, anchor, tap=True, **options)

    def extra_repr(self) -> str:
        sizes = [tuple(weight.shape) for weight in self.weights]
        return f"weights={sizes}, activation={self.activation!r}"


_probes = itertools.count()


def _keeps_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether the function that a module applies to its tensors keeps values; `to_empty` does not.

    Each probe has new values, because `fn` may get the memory of an earlier probe.
    """
    probe = torch.arange(8, dtype=torch.float32, device="cpu") + next(_probes) % 128
    found = fn(probe)
    if type(found) is not Tensor:  # as in FakeTensorMode
        return True
    return torch.equal(found.detach().double().cpu(), probe.to(found.dtype).double())
