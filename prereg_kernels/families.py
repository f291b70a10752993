"""Where each model family keeps its decoder layers, image tokens and embeddings: a table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """The few facts that PRe needs about a family of multimodal models.

    Attributes:
        name: as people call it.
        model_types: the `config.model_type` values that belong to it.
        language_model: path of the module whose forward gets the merged `inputs_embeds`.
        layers: path of the decoder layers, an `nn.ModuleList`.
        visual_tokens: names of the config attributes that hold visual token ids.
    """

    name: str
    model_types: tuple[str, ...]
    language_model: str = "model.language_model"
    layers: str = "model.language_model.layers"
    visual_tokens: tuple[str, ...] = ("image_token_id",)

    def language_model_of(self, model: nn.Module) -> nn.Module:
        """The module whose forward gets the merged embeddings."""
        return _follow(model, self.language_model)

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers."""
        return _follow(model, self.layers)

    def visual_token_ids(self, model: nn.Module) -> tuple[int, ...]:
        """The ids that mark visual positions in `input_ids`."""
        config: Any = model.config
        return tuple(getattr(config, name) for name in self.visual_tokens)


FAMILIES = (Family("LLaVA", ("llava",)),)


def find_family(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ValueError: the model belongs to no supported family; the message lists those that do.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types and hasattr(model, "lm_head"):
            return family
    supported = "; ".join(f"{f.name} (model_type {', '.join(f.model_types)})" for f in FAMILIES)
    raise ValueError(
        f"model: {type(model).__name__} (model_type {model_type!r}) is not supported; expected a "
        f"conditional-generation model of one of these families: {supported}"
    )


def _follow(module: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), module)
