"""PReConfig: the settings of Predictive Regularization on a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.inputs import check_name, check_spec

Anchor = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class PReConfig:
    """How PRe is attached; the defaults are those of the paper (arXiv 2603.20808).

    Attributes:
        layers: which hidden states to regularise, an int or several, counted as the paper does:
            16 is the output of the 16th decoder layer. None: the middle one.
        weight: lambda in `L = L_LM + lambda * L_PRe`, at least 0. Several layers share it: L_PRe
            is their mean.
        anchor: "pre_llm", the visual features as they enter the LLM, or a function that gets the
            keyword arguments of the model's forward and returns (N, A), a row for each visual
            token in the order of `input_ids`; it runs without grad.
        anchor_features: A; needed with an anchor function, else the LLM's width.
        head_features: M, the width inside the head. None: the LLM's width.
        depth: matrices in the head. activation: between them.
        loss, normalize: as for `fused_pre_loss`.
        value_in_forward: also compute the value of L_PRe in the training forward, and add it to
            the loss's value, at two more matmuls a step. By default the value of the loss is L_LM
            and only its gradient is that of the sum; `metrics()` has L_PRe after backward.
        value_in_eval: compute L_PRe for `metrics()` in evaluation too.
        seed: of the heads' initialisation, so that it leaves the global generator alone.
    """

    layers: int | Sequence[int] | None = None
    weight: float = 0.5
    anchor: str | Anchor = "pre_llm"
    anchor_features: int | None = None
    head_features: int | None = None
    depth: int = 2
    activation: str = "gelu"
    loss: str = "cosine"
    normalize: str = "none"
    value_in_forward: bool = False
    value_in_eval: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight: expected a non-negative finite number, got {self.weight!r}")
        check_spec(self.activation, self.loss, self.normalize, 1.0, torch.float32)
        for name, least in (("depth", 0), ("head_features", 1), ("anchor_features", 1)):
            value = getattr(self, name)
            if value is None and name != "depth":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if not callable(self.anchor):
            check_name("anchor", self.anchor, ("pre_llm", "a function"))
        if callable(self.anchor) != (self.anchor_features is not None):
            raise ValueError(
                "anchor_features: expected the width A with an anchor function, None without; "
                f"got {self.anchor_features!r}"
            )

    def replace(self, **overrides: Any) -> PReConfig:
        """A copy with some fields changed.

        Raises:
            TypeError: an unknown field.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in known:
                raise TypeError(f"{name}: not a setting of PRe; expected one of {', '.join(known)}")
        return dataclasses.replace(self, **overrides)

    def resolve_layers(self, count: int) -> tuple[int, ...]:
        """The layers of a decoder with `count` of them.

        Raises:
            TypeError, ValueError: not integers, none at all, duplicates, or out of range.
        """
        layers = max(1, count // 2) if self.layers is None else self.layers
        if not isinstance(layers, (int, Sequence)):
            raise TypeError(f"layers: expected an int or several, got {self.layers!r}")
        numbers = (layers,) if isinstance(layers, int) else tuple(layers)
        if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in numbers):
            raise TypeError(f"layers: expected an int or several, got {self.layers!r}")
        if not numbers or len(set(numbers)) != len(numbers):
            raise ValueError(f"layers: expected one or more different layers, got {self.layers!r}")
        for layer in numbers:
            if not 1 <= layer <= count:
                raise ValueError(
                    f"layers: the decoder has {count} layers, numbered 1 to {count}; got {layer}"
                )
        return numbers

    def to_json(self, layers: Sequence[int]) -> dict[str, Any]:
        """The fields as JSON values, with the resolved layers; a function becomes "function"."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        anchor = "function" if callable(self.anchor) else self.anchor
        return fields | {"anchor": anchor, "layers": list(layers)}

    def anchor_width(self, llm_width: int) -> int:
        """A, for an LLM of that width."""
        return llm_width if self.anchor_features is None else self.anchor_features
