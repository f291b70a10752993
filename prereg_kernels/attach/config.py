# SPDX-License-Identifier: Apache-2.0
"""PReConfig: the settings of Predictive Regularization on a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from prereg_kernels.ops.activations import ACTIVATIONS, Activation, ActivationName
from prereg_kernels.ops.dtypes import DTYPES
from prereg_kernels.ops.losses import Loss, LossName
from prereg_kernels.ops.names import NormalizationName
from prereg_kernels.ops.spec import check_name, check_spec

Anchor = Callable[[Mapping[str, Any]], Tensor]
AnchorName = Literal["pre_llm", "pre_projector"]
LevelName = Literal["patch", "global"]
GradientName = Literal["auto", "loss", "tap"]
ScheduleName = Literal["constant", "linear", "cosine"]
ANCHORS: tuple[AnchorName, ...] = get_args(AnchorName)
LEVELS: tuple[LevelName, ...] = get_args(LevelName)
GRADIENTS: tuple[GradientName, ...] = get_args(GradientName)
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
# What a head is: under another of these its parameters have other shapes or mean something else.
HEAD_SETTINGS = ("layers", "share_head", "head_features", "depth", "activation")


@dataclass(frozen=True)
class PReConfig:
    """How PRe is attached; the defaults are those of the paper (arXiv 2603.20808).

    docs/anchors.md has the exact meaning of `anchor`, `level`, `token_fraction` and the heads.

    Attributes:
        layers: which hidden states to regularise, an int or several, counted as the paper does:
            16 is the output of the 16th decoder layer. None: the middle one.
        weight: lambda in `L = L_LM + lambda * L_PRe`, at least 0. With several layers, L_PRe is
            the mean over them. With a weight of 0, L_PRe is not computed: see `PRe.weight`.
        anchor: what the head predicts. "pre_llm": the visual features as they enter the LLM.
            "pre_projector": the vision encoder's output for each visual token, as it enters the
            projector; of several patches, joined or averaged as the model does. Or a function,
            which gets the keyword arguments of the model's forward. It returns (N, A), floating,
            on the batch's device: a row for each visual token in the order of `input_ids`, or,
            with level="global", for each image. It runs without grad. The first pass with images
            checks that its numbers are finite.
        anchor_features: A. Needed with an anchor function; otherwise found on the model.
        level: "patch": each visual token predicts its own anchor. "global": for each image, the
            mean over its visual tokens predicts the mean of their anchors, and L_PRe is the mean
            over the images.
        token_fraction: in (0, 1]: the part of the visual tokens for which the gradient is
            computed. Every training pass draws them anew. The gradient's expectation is that of
            all tokens.
        share_head: True: one head for all of the layers. False: one for each.
        head_features: M, the width inside the head. None: the LLM's width.
        depth: how many matrices the head has. activation: the function between them.
        loss, normalize: as for `fused_pre_loss`.
        value_in_forward: True: the training forward also computes the value of L_PRe and adds it
            to the loss's value, at two more matmuls a step. False: the loss's value is L_LM, only
            its gradient is that of the sum, and `metrics()` has L_PRe after backward.
        gradient: how the term's gradient reaches the parameters. "loss": through the loss that
            holds the term, the model's or, by `pre.loss`, yours. "tap": backward adds it by itself
            at layer l, times `pre.loss_scale`, whatever loss you differentiate. The model's loss
            is then left alone, as in Megatron-LM with its routers' losses. "auto": "tap" where a
            call gets no labels and your loss does not hold `pre.loss`, otherwise "loss". A
            backward pass that keeps its graph may be one of several, so it adds nothing by itself.
        value_in_eval: compute L_PRe for `metrics()` in evaluation too, over all visual tokens.
            There is none for tokens that generation appends. With level="global", or an anchor
            other than "pre_llm", there is none for a prompt whose images were encoded before its
            call, as `generate` of transformers 5.24 does.
        seed: at least 0. For the heads' initialisation, which leaves the global generator alone,
            and for the draws of `token_fraction`.
        head_dtype: of the heads' parameters, a torch.dtype or its name. None: float32, or float64
            on a float64 model, because a step of 1e-5, a learning rate of full fine-tuning, leaves
            every bfloat16 weight above 1/256 as it was. The matmuls run in the dtype of the hidden
            states in any case.
        head_learning_rate, head_weight_decay: for the heads, at least 0. Biases have no decay.
            None: the model's. PReTrainer's optimizer and `pre.parameter_groups` follow them;
            another optimizer does not know of them.
        weight_schedule: how the weight falls to 0 by the end of the run: "constant" (it does not),
            "linear" or "cosine", as for learning rates. PReTrainer follows this and the next three
            settings; PReCallback follows all but `gradient_ratio`. Another loop sets `pre.weight`
            to `config.weight_at(step, steps)`.
        weight_warmup_steps: in how many steps the weight first rises from 0. Below 1: a share of
            the run's steps.
        gradient_ratio: the target for the norm of weight * L_PRe's gradient at the layer's states,
            as a share of the norm of L_LM's. The weight starts from `weight` and is adjusted by
            what is measured every `watch_steps`. The schedule multiplies it. None: no adjustment.
        watch_steps: in the first step and every so many steps, the logs get the norms of both
            gradients and their cosine, as `PRe.metrics` says. None: never.

    Example:
        >>> config = PReConfig(layers=(8, 16), loss="smooth_l1", normalize="l2")
        >>> config.weight, config.depth, config.activation
        (0.5, 2, 'gelu')
        >>> config.replace(weight=1.0).weight
        1.0
        >>> PReConfig(level="image")
        Traceback (most recent call last):
        ValueError: level: expected one of patch, global; got 'image'
    """

    layers: int | Sequence[int] | None = None
    weight: float = 0.5
    anchor: AnchorName | Anchor = "pre_llm"
    anchor_features: int | None = None
    level: LevelName = "patch"
    token_fraction: float = 1.0
    share_head: bool = False
    head_features: int | None = None
    depth: int = 2
    activation: ActivationName | Activation = "gelu"
    loss: LossName | Loss = "cosine"
    normalize: NormalizationName = "none"
    value_in_forward: bool = False
    value_in_eval: bool = False
    gradient: GradientName = "auto"
    seed: int = 0
    head_dtype: torch.dtype | str | None = None
    head_learning_rate: float | None = None
    head_weight_decay: float | None = None
    weight_schedule: ScheduleName = "constant"
    weight_warmup_steps: float = 0
    gradient_ratio: float | None = None
    watch_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "weight_warmup_steps", "head_learning_rate", "head_weight_decay"):
            value = getattr(self, name)
            if value is not None or name.startswith("weight"):
                check_rate(name, value)
        if not isinstance(self.share_head, bool):
            raise TypeError(f"share_head: expected True or False, got {self.share_head!r}")
        spec = check_spec(self.activation, self.loss, self.normalize, 1.0, torch.float32)
        object.__setattr__(self, "activation", spec.activation)
        object.__setattr__(self, "loss", spec.loss)
        for name, least, optional in (
            ("depth", 0, False),
            ("seed", 0, False),
            ("head_features", 1, True),
            ("watch_steps", 1, True),
            ("anchor_features", 1, True),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if not callable(self.anchor):
            check_name("anchor", self.anchor, (*ANCHORS, "a function"))
        if callable(self.anchor) and self.anchor_features is None:
            raise ValueError(
                "anchor_features: expected the width A of the anchor function's rows, got None"
            )
        if self.anchor == "pre_llm" and self.anchor_features is not None:
            raise ValueError(
                "anchor_features: expected None with anchor='pre_llm', whose width is the LLM's, "
                f"got {self.anchor_features!r}"
            )
        object.__setattr__(self, "head_dtype", _dtype(self.head_dtype))
        check_name("level", self.level, LEVELS)
        check_name("gradient", self.gradient, GRADIENTS)
        check_name("weight_schedule", self.weight_schedule, SCHEDULES)
        self._check_watching()
        if not _is_number(self.token_fraction) or not 0 < self.token_fraction <= 1:
            raise ValueError(
                f"token_fraction: expected a number in (0, 1], got {self.token_fraction!r}"
            )
        if self.token_fraction < 1 and self.level == "global":
            raise ValueError(
                "token_fraction: expected 1 with level='global', where the rows are means over "
                f"whole images, got {self.token_fraction!r}"
            )

    def _check_watching(self) -> None:
        if self.watch_steps is not None and self.level == "global":
            raise ValueError(
                "watch_steps: expected None with level='global', whose gradient is that of means; "
                f"got {self.watch_steps}"
            )
        if self.gradient_ratio is None:
            return
        if not _is_number(self.gradient_ratio) or not 0 < self.gradient_ratio < math.inf:
            raise ValueError(
                f"gradient_ratio: expected a positive finite number, got {self.gradient_ratio!r}"
            )
        if self.watch_steps is None or not self.weight:
            raise ValueError(
                "gradient_ratio: needs watch_steps, by which the gradients are measured, and a "
                f"positive weight to begin with; got {self.watch_steps} and {self.weight}"
            )

    def weight_at(self, step: int, steps: int) -> float:
        """The weight by its schedule, in the step after so many of all steps of a run.

        These are the schedules of transformers' `get_linear_schedule_with_warmup` and so on.

        Example:
            >>> config = PReConfig(weight=0.5, weight_schedule="cosine", weight_warmup_steps=10)
            >>> [round(config.weight_at(step, 90), 3) for step in (0, 5, 10, 50, 90)]
            [0.0, 0.25, 0.5, 0.25, 0.0]
        """
        warmup = self.weight_warmup_steps
        if warmup < 1:
            warmup = math.ceil(warmup * steps)
        if step < warmup:
            return self.weight * step / warmup
        if self.weight_schedule == "constant":
            return self.weight
        progress = min((step - warmup) / max(1, steps - warmup), 1.0)
        if self.weight_schedule == "linear":
            return self.weight * (1 - progress)
        return self.weight * 0.5 * (1 + math.cos(math.pi * progress))

    def replace(self, **overrides: Unpack[Settings]) -> PReConfig:
        """A copy with some fields changed.

        Raises:
            TypeError: an unknown field.

        Example:
            >>> PReConfig(layers=3).replace(level="global").layers
            3
        """
        self._check_names(overrides)
        return dataclasses.replace(self, **overrides)

    def resolve_layers(self, count: int) -> tuple[int, ...]:
        """The layers of a decoder with `count` of them.

        Raises:
            TypeError, ValueError: not integers, none at all, duplicates, or out of range.

        Example:
            >>> PReConfig().resolve_layers(32), PReConfig(layers=(8, 16)).resolve_layers(32)
            ((16,), (8, 16))
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

    def head_dtype_on(self, dtype: torch.dtype, as_it_is: bool = False) -> torch.dtype:
        """The heads' dtype on layers of this dtype, which is the default if `as_it_is`."""
        assert not isinstance(self.head_dtype, str)  # __post_init__ looked it up
        default = dtype if as_it_is or dtype == torch.float64 else torch.float32
        return self.head_dtype or default

    def to_json(self, layers: Sequence[int]) -> dict[str, Any]:
        """The fields as JSON values, with the resolved layers; a function becomes "function"."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names = {"anchor": _anchor_name(self.anchor), "head_dtype": _dtype_name(self.head_dtype)}
        return fields | names | {"layers": list(layers)}

    @classmethod
    def from_json(
        cls, saved: Mapping[str, Any], overrides: Mapping[str, Any], count: int
    ) -> PReConfig:
        """The settings that `to_json` wrote, some of them changed.

        Args:
            overrides: other settings; of `HEAD_SETTINGS` the same. An anchor function, which was
                not written, has to be among them.
            count: the layers of the decoder.

        Raises:
            ValueError: an override asks for other heads, an anchor function is missing, or a field
                is of another version.
            TypeError: an override is no setting.
        """
        cls._check_names(overrides)
        strange = set(saved) - {field.name for field in dataclasses.fields(cls)}
        if strange:
            raise ValueError(
                f"from_pretrained: expected settings of this version of PRe, got {sorted(strange)}"
            )
        for name in HEAD_SETTINGS:
            value = overrides.get(name, saved.get(name))
            if name == "layers":
                value = list(cls(layers=value).resolve_layers(count))
            elif name == "activation" and value is not None:
                value = ACTIVATIONS.text_of(value)
            if name in saved and value != saved[name]:
                raise ValueError(
                    f"{name}: the heads were saved with {saved[name]!r}, which they cannot change; "
                    f"expected that or nothing, got {value!r}"
                )
        source = saved.get("anchor")
        if source == "function" and "anchor" not in overrides:
            raise ValueError(
                "anchor: the heads were trained with a function, which is not written to files; "
                "expected that function, got none"
            )
        fields = {**saved, **overrides, "layers": tuple(saved["layers"])}
        if _anchor_name(fields.get("anchor")) != source and "anchor_features" not in overrides:
            fields["anchor_features"] = None  # it was the other anchor's
        return cls(**fields)

    @classmethod
    def _check_names(cls, overrides: Mapping[str, Any]) -> None:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                raise TypeError(f"{name}: not a setting of PRe; expected one of {', '.join(known)}")


class Settings(TypedDict, total=False):
    """The fields of PReConfig as keyword arguments; a test holds both equal."""

    layers: int | Sequence[int] | None
    weight: float
    anchor: AnchorName | Anchor
    anchor_features: int | None
    level: LevelName
    token_fraction: float
    share_head: bool
    head_features: int | None
    depth: int
    activation: ActivationName | Activation
    loss: LossName | Loss
    normalize: NormalizationName
    value_in_forward: bool
    value_in_eval: bool
    gradient: GradientName
    seed: int
    head_dtype: torch.dtype | str | None
    head_learning_rate: float | None
    head_weight_decay: float | None
    weight_schedule: ScheduleName
    weight_warmup_steps: float
    gradient_ratio: float | None
    watch_steps: int | None


def _anchor_name(anchor: Any) -> Any:
    return "function" if callable(anchor) else anchor


def _dtype(value: Any) -> torch.dtype | None:
    if value is None:
        return None
    dtypes = {_dtype_name(dtype): dtype for dtype in DTYPES}
    dtype = dtypes.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype not in DTYPES:
        raise ValueError(
            f"head_dtype: expected None, or one of {', '.join(map(str, dtypes))} as a torch.dtype "
            f"or its name; got {value!r}"
        )
    return dtype


def _dtype_name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def check_rate(name: str, value: Any) -> None:
    """Raise ValueError unless this is a number that may multiply something."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a non-negative finite number, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
