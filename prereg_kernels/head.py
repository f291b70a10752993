"""PReHead: the predictor f of Predictive Regularization, an MLP that computes its own loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels.inputs import ACTIVATIONS, check_name
from prereg_kernels.loss import fused_pre_loss
from prereg_kernels.tap import pre_tap


class PReHead(nn.Module):
    """An MLP from hidden states to anchors (the paper's: depth 2), whose forward is the PRe loss.

    Args:
        in_features: D, the width of the hidden states.
        out_features: A, the width of the anchor.
        hidden_features: M, the width in between; None: `in_features`.
        depth: matrices in the head, 0 (no head; then D == A) to any number.
        activation: "gelu", "gelu_tanh", "silu" or "relu", between the matrices.
        bias: whether every layer has a bias.
        device, dtype: of the parameters, as for `nn.Linear`, whose initialisation this uses.

    The parameters belong to this module itself, not to submodules: FSDP and ZeRO gather a module's
    own parameters when its forward is called, and no submodule's forward ever is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int | None = None,
        *,
        depth: int = 2,
        activation: str = "gelu",
        bias: bool = True,
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
        check_name("activation", activation, ACTIVATIONS)
        if depth == 0 and in_features != out_features:
            raise ValueError(
                f"depth: 0 needs in_features == out_features, got {in_features} and {out_features}"
            )
        self.activation, self.depth = activation, depth
        widths = [in_features, *[hidden_features] * (depth - 1), out_features][: depth + 1]
        for layer in range(depth):
            shape = (widths[layer + 1], widths[layer])
            weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(f"weight_{layer}", weight)
            vector = torch.empty(shape[0], device=device, dtype=dtype)
            self.register_parameter(f"bias_{layer}", nn.Parameter(vector) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, uniformly in +-1/sqrt(in_features) as `nn.Linear` does."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

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
            hidden, anchor, options: as for those functions, but for weights, biases, activation.
        """
        function = pre_tap if tap else fused_pre_loss
        return function(
            hidden, anchor, self.weights, self.biases, activation=self.activation, **options
        )

    def tap(self, hidden: Tensor, anchor: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """`pre_tap` with this head's parameters, called as the module so that its hooks run."""
        return self(hidden, anchor, tap=True, **options)

    def extra_repr(self) -> str:
        sizes = [tuple(weight.shape) for weight in self.weights]
        return f"weights={sizes}, activation={self.activation!r}"
