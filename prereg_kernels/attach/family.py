# SPDX-License-Identifier: Apache-2.0
"""Family: where a model keeps its decoder layers, its visual tokens and its embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prereg_kernels._util import private
from prereg_kernels.attach.visual import find_marked, hide

Token = str | int
Layout = Literal["crop", "tiles", "blocks"]
"""How the checkup finds the place of each visual token in its image; see
`prereg_kernels.checkup.images.layouts`."""


@dataclass(frozen=True)
class Family:
    """The few facts that PRe and the checkup need about a family of multimodal models.

    `apply_pre` finds most of them on a model of transformers (`prereg_kernels.attach.resolver`).
    Pass those that it does not find, or finds wrong: `apply_pre(model, family=Family(...))`.
    A path is the dotted name of a registered submodule, relative to the model that `apply_pre`
    gets. That model, or its language model, needs `get_input_embeddings`, as in transformers.

    Example:
        >>> family = Family("mine", layers="model.language_model.layers", visual_tokens=(50,))
        >>> apply_pre(model, family=family).family.language_model  # found
        'model.language_model'
        >>> len(family.layers_of(model))
        4

    Attributes:
        name: as people call it.
        model_types: the `config.model_type` values that belong to it.
        refused: the reason why PRe cannot work on it, which follows the family's name in the
            error. None: PRe can.
        language_model: path of the module whose forward gets the merged `inputs_embeds`. None:
            `apply_pre` finds it.
        layers: path of the decoder layers, an `nn.ModuleList`. A layer returns its hidden states,
            or a tuple that begins with them. None: `apply_pre` finds it.
        visual_tokens: ids of visual tokens, or names of the config attributes that hold one or
            several ids; a dotted name leads into a part of the config. None: `apply_pre` finds
            them, unless there is a `visual_mask`.
        visual_mask: a function that says which positions are visual. It takes the keyword
            arguments of the model's forward, and returns a bool mask of the decoder's sequence,
            (rows, length). It has to leave out what attention hides, because the attention mask
            may be of another sequence.
        other_tokens: like `visual_tokens`, for tokens that get features and are not visual, such as
            audio. They are added to those that `apply_pre` finds.
        enters_at: index of the decoder layer whose input is the first to hold the visual features,
            or a function from the config to it. That input is the anchor "pre_llm". None: the
            `inputs_embeds` hold them, or, if there are none, the first layer's input.
        streams: a function for layers whose output is several residual streams. It takes the
            output and the width D, and returns what PRe reads, (rows, length, D). None: the output
            has that shape.
        codes: a function from the config to the ids of words that are codes of pictures. A batch
            may have them in place of pixels; then `PRe.next_visual_mask` has to say where.
        starts_at_zero: whether a projector that has not been trained gives zeros.
        projector: path of the module that receives the vision encoder's output as its first
            argument, a row for each visual token in the order of `input_ids`. It is the source of
            the anchor "pre_projector". If it is called once for images and again for videos, the
            calls come in the order of `visual_tokens`. None: there is no such module.
        joins_rows: whether the projector makes a token of several rows that follow each other, as
            the mergers of Qwen's models. The anchor of a token is these rows, joined.
        places: a function for an encoder whose order is another, as Qwen2.5-VL's windows. It takes
            the config and the keyword arguments of the model's forward, and returns where among
            the visual tokens each row of the projector belongs: (N,), int64. None: the order is
            that of the tokens.
        regroups: why there is no `projector`, shown after the family's name in the error message.
        images: how `level="global"` tells images apart, "runs" or "equal" (see
            `prereg_kernels.attach.image_spans`). None: a batch does not say.
        counted_by: the arguments of the model's forward that have an entry for each image or
            video. cut_by: those that have a (t, h, w) for each video that is laid out as t runs of
            tokens, each of them an image.

    The checkup of image files needs the following. PRe needs none of it.

    Attributes:
        layout: where an image's tokens lie. "crop": a token for each patch of the resized and
            cropped image, row by row. "tiles": as LLaVA-NeXT. "blocks": a token for each block of
            merged patches of the image at its own size. Or a function that returns a `TokenGrid`.
            It takes the model's config, its image processor, the (height, width) of an image, and
            the processor's output for it. None: not known, so image files cannot be measured.
        towers: `model_type`s of the vision encoders that the layout was tested with. Empty: any.
        processor: a function from the model's config to the name and the settings of the family's
            usual image processor, for directories without one.
        markers: names of the config attributes with the ids before and after an image's tokens.
        token_types: name of the argument of the model's forward that is 1 at image tokens.
    """

    name: str
    model_types: tuple[str, ...] = ()
    refused: str | None = None
    language_model: str | None = None
    layers: str | None = None
    visual_tokens: tuple[Token, ...] | None = None
    visual_mask: Callable[[Mapping[str, Any]], Tensor] | None = None
    other_tokens: tuple[Token, ...] = ()
    enters_at: int | Callable[[Any], int] | None = None
    streams: Callable[[Tensor, int], Tensor] | None = None
    codes: Callable[[Any], Sequence[int]] | None = None
    starts_at_zero: bool = False
    projector: str | None = None
    joins_rows: bool = False
    places: Callable[[Any, Mapping[str, Any]], Tensor] | None = None
    regroups: str = "was given no projector"
    images: Literal["runs", "equal"] | None = None
    counted_by: tuple[str, ...] = ()
    cut_by: tuple[str, ...] = ()
    layout: Layout | Callable[..., Any] | None = None
    towers: tuple[str, ...] = ()
    processor: Callable[[Any], tuple[str, dict[str, Any]]] | None = None
    markers: tuple[str, ...] = ()
    token_types: str | None = None

    def __post_init__(self) -> None:
        for field in ("language_model", "layers", "projector"):
            path = getattr(self, field)
            if path is not None and not isinstance(path, str):
                raise TypeError(f"{field}: expected the path of a submodule or None, got {path!r}")
        for field in ("visual_tokens", "other_tokens"):
            tokens = getattr(self, field)
            if tokens is None and field == "visual_tokens":
                continue
            if not isinstance(tokens, tuple) or not all(map(_is_token, tokens)):
                raise TypeError(
                    f"{field}: expected a tuple of ids, or of names of config attributes that hold "
                    f"them, got {tokens!r}"
                )
        if self.visual_tokens == ():
            raise ValueError("visual_tokens: expected one at least, or None, got ()")
        if self.visual_mask is not None and self.visual_tokens is not None:
            raise ValueError("visual_mask: expected it or visual_tokens, got both")
        for field in ("visual_mask", "streams", "codes", "places"):
            function = getattr(self, field)
            if function is not None and not callable(function):
                raise TypeError(f"{field}: expected a function or None, got {function!r}")
        for field, what in (
            ("counted_by", "arguments"),
            ("cut_by", "arguments"),
            ("towers", "vision encoders"),
            ("markers", "config attributes"),
        ):
            names = getattr(self, field)
            if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
                raise TypeError(f"{field}: expected a tuple of names of {what}, got {names!r}")
        if self.images not in ("runs", "equal", None):
            raise ValueError(f"images: expected 'runs', 'equal' or None, got {self.images!r}")
        if self.images == "equal" and not self.counted_by:
            raise ValueError("counted_by: images='equal' needs the arguments that count them")
        layouts = get_args(Layout)
        if self.layout not in (*layouts, None) and not callable(self.layout):
            expected = ", ".join(map(repr, layouts))
            raise ValueError(
                f"layout: expected {expected}, a function or None, got {self.layout!r}"
            )
        entry = self.enters_at
        is_index = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
        if entry is not None and not is_index and not callable(entry):
            raise ValueError(
                "enters_at: expected the index of a decoder layer, a function from the config to "
                f"it, or None; got {entry!r}"
            )
        if len(self.markers) not in (0, 2):
            raise ValueError(f"markers: expected one before and one after, got {self.markers!r}")

    def language_model_of(self, model: nn.Module) -> nn.Module:
        """The module whose forward gets the merged embeddings.

        Raises:
            ValueError: there is none at that path.
        """
        return self._follow(model, "language_model")

    def parts_around_language_model(self, model: nn.Module) -> list[nn.Module]:
        """The modules between the model and the language model, outermost first."""
        assert self.language_model is not None  # the resolver has found it
        parts, module = [], model
        for name in self.language_model.split(".")[:-1]:
            module = module.get_submodule(name)
            parts.append(module)
        return parts

    def embeddings_of(self, model: Any) -> nn.Module:
        """The embedding table, as the model or else its language model gives it.

        Raises:
            ValueError: neither does.
        """
        modules: tuple[Any, ...] = (model, self.language_model_of(model))
        for module in modules:
            with suppress(AttributeError, NotImplementedError):
                embeddings: nn.Module = module.get_input_embeddings()
                return embeddings
        raise ValueError(
            f"model: expected {type(model).__name__} or {self.language_model!r} to have "
            "get_input_embeddings(), which returns the embedding table of input_ids; got none"
        )

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers.

        Raises:
            ValueError: there are none at that path.
        """
        layers = self._follow(model, "layers")
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise ValueError(
                f"family.layers: expected an nn.ModuleList of decoder layers at {self.layers!r}, "
                f"got {type(layers).__name__} with {names_of(layers)}"
            )
        return layers

    def projector_of(self, model: nn.Module) -> nn.Module:
        """The module whose input is the anchor "pre_projector".

        Raises:
            ValueError: there is none at that path, or the family has none.
        """
        return self.projectors_of(model)[0]

    def projectors_of(self, model: nn.Module) -> list[nn.Module]:
        """The same, and those that may run in its place: PEFT's copies of what it trains whole.

        Raises:
            ValueError: as `projector_of`.
        """
        if self.projector is None:
            raise ValueError(
                "anchor: 'pre_projector' needs a row of the vision encoder for each visual token, "
                f"but {self.name} {self.regroups}; expected 'pre_llm' or a function"
            )
        return self._follow_all(model, "projector")

    def visual_token_ids(self, model: nn.Module) -> tuple[int, ...]:
        """The ids that mark visual positions in `input_ids`; none where `visual_mask` does.

        Raises:
            ValueError: the model's config lacks one.
        """
        return _ids_of(self.visual_tokens or (), model, "visual_tokens")

    def other_token_ids(self, model: nn.Module) -> tuple[int, ...]:
        """The ids of tokens that get features and are not visual.

        Raises:
            ValueError: the model's config lacks one.
        """
        return _ids_of(self.other_tokens, model, "other_tokens")

    def marked(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The visual positions of the decoder's sequence, hidden or not: bool, (rows, length).

        Args:
            batch: the keyword arguments of the model's forward.

        Raises:
            TypeError, ValueError: it has no `input_ids`, or `visual_mask` gives no such mask.
        """
        if self.visual_mask is None:
            input_ids = batch.get("input_ids")
            if input_ids is None:
                raise ValueError(
                    "input_ids: PRe finds the visual tokens by it; expected ids, or a mask in "
                    "pre.next_visual_mask, got None"
                )
            return find_marked(input_ids, self.visual_token_ids(model))
        mask = self.visual_mask(batch)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            came = (
                f"{tuple(mask.shape)} of {mask.dtype}"
                if isinstance(mask, Tensor)
                else type(mask).__name__
            )
            raise TypeError(
                "family.visual_mask: expected it to return a bool Tensor, (rows, length), got "
                f"{came}"
            )
        return mask

    def shown(self, marked: Tensor, attention_mask: Any) -> Tensor:
        """The marked positions that attention shows. `visual_mask` marks no others."""
        return marked if self.visual_mask is not None else hide(marked, attention_mask)

    def entry_of(self, model: Any) -> int | None:
        """`enters_at`, of this model."""
        return self.enters_at(model.config) if callable(self.enters_at) else self.enters_at

    def states_of(self, output: Any, width: int) -> Tensor:
        """What PRe reads of a decoder layer's output: (rows, length, D)."""
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states if self.streams is None else self.streams(states, width)

    def _follow(self, model: nn.Module, field: str) -> Any:
        return self._follow_all(model, field)[0]

    def _follow_all(self, model: nn.Module, field: str) -> list[Any]:
        path = getattr(self, field)
        assert path is not None  # the resolver has found it
        modules: list[Any] = [model]
        for depth, name in enumerate(path.split(".")):
            found = []
            for module in (each for outer in modules for each in _insides(outer)):
                # Not getattr: a wrapper may pass on the names of what it wraps.
                inner = private.submodules(module).get(name)
                if inner is None:
                    here = ".".join(["model", *path.split(".")[:depth]])
                    raise ValueError(
                        f"family.{field}: there is no {path!r} in {type(model).__name__}: {here}, "
                        f"a {type(module).__name__}, has no submodule {name!r}; it has "
                        f"{names_of(module)}"
                    )
                found.append(inner)
            modules = found
        return modules


def _insides(module: nn.Module) -> list[Any]:
    """The module; or, of PEFT's wrapper of one that it trains whole, each copy and the original."""
    parts = private.submodules(module)
    copies, original = parts.get("modules_to_save"), parts.get("original_module")
    if copies is None or original is None:
        return [module]
    return [*private.submodules(copies).values(), original]


def _is_token(token: Any) -> bool:
    return isinstance(token, (str, int)) and not isinstance(token, bool)


def _ids_of(tokens: Sequence[Token], model: Any, field: str) -> tuple[int, ...]:
    ids: list[int] = []
    for token in tokens:
        config = getattr(model, "config", None)
        value = token if isinstance(token, int) else config_value(config, token)
        several = value if isinstance(value, (list, tuple)) else [value]
        if not several or not all(type(x) is int for x in several):
            came = "no such attribute" if value is MISSING else repr(value)
            raise ValueError(
                f"family.{field}: expected the id of a token at model.config.{token}, got {came} "
                f"in {type(config).__name__}"
            )
        ids += several
    return tuple(ids)


MISSING = object()


def config_value(config: Any, path: str) -> Any:
    """At a dotted path; `MISSING` where there is none. A part may be a dict."""
    for name in path.split("."):
        if isinstance(config, Mapping):
            config = config.get(name, MISSING)
        else:
            config = getattr(config, name, MISSING)
    return config


def names_of(module: nn.Module) -> str:
    """The names of a module's own submodules, for error messages."""
    names = list(private.submodules(module))
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return shown or "no submodules"
