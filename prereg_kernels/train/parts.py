# SPDX-License-Identifier: Apache-2.0
"""The parts of a model, "tower", "projector" and "llm", and which of them train."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from prereg_kernels.attach.resolver import find_family

PARTS = ("tower", "projector", "llm")
"""What a stage trains."""
PROJECTORS = {
    "multi_modal_projector", "projector", "mm_projector", "connector", "merger", "merger_list",
    "deepstack_merger_list", "patch_merger", "modality_projection", "aligner", "embed_vision",
    "resampler", "vision_projector", "perceiver", "perceiver_resampler", "vision_embed_tokens",
    "text_hidden_fcs", "mlp1", "qformer", "image_embed",
}  # fmt: skip
"""What a projector is called that is within an encoder or the LLM, or is a model of its own. Any
other module between encoder and LLM needs no entry."""
ENCODERS = {"vision_tower", "vision_model", "vision_encoder", "visual", "image_tower"}
"""What an encoder is called that is no model of transformers."""


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """{part: names of its parameters}, of "tower", "projector", "llm".

    The tower is every encoder, and what hears sounds or draws images: none of it is the way from an
    image into the LLM. The projector is what is left between the two. The LLM of a model with an
    encoder and a decoder of text is both.

    Raises:
        ValueError: no model that PRe knows.
    """
    kinds = _Kinds(model)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[kinds.part_of(name, parameter)].append(name)
    return parts


class _Kinds:
    """What says of a parameter which part it is in."""

    def __init__(self, model: Any) -> None:
        family = find_family(model)
        assert family.language_model is not None
        self.llm, self.layers = f"{family.language_model}.", f"{family.layers}."
        self.words = {id(p) for m in _embeddings(model) for p in m.parameters()}
        self.decodes_text = "encoder" in family.language_model.split(".")
        self.encoders = [
            f"{path}."
            for path, module in model.named_modules()
            if isinstance(module, PreTrainedModel) or path.rpartition(".")[2] in ENCODERS
            if path and not self.llm.startswith(f"{path}.")
        ]

    def part_of(self, name: str, parameter: nn.Parameter) -> str:
        if id(parameter) in self.words or name.startswith(self.layers):
            return "llm"
        steps = name.split(".")
        if any("audio" in x or "speech" in x or x.startswith("generation") for x in steps):
            return "tower"
        # The innermost decides: a projector may be within an encoder, and an encoder within one
        projector = max((i + 1 for i, step in enumerate(steps) if step in PROJECTORS), default=0)
        encoder = max((x.count(".") for x in self.encoders if name.startswith(x)), default=0)
        if projector or encoder:
            if projector >= encoder:
                return "projector"
            return "llm" if self.decodes_text and "decoder" in steps[:encoder] else "tower"
        return "llm" if name.startswith(self.llm) else "projector"


def _embeddings(model: Any) -> Iterator[nn.Module]:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            yield module


def linear_of_llm(model: Any) -> list[str]:
    """The linear layers of the LLM but the one that gives words: what an adapter is put on."""
    names, words = set(parts_of(model)["llm"]), model.get_output_embeddings()
    return [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in names and module is not words
    ]  # fmt: skip


def modules_of(model: nn.Module, names: Collection[str]) -> list[str]:
    """The outermost modules that have no parameters but these; one that stands alone in a module
    with others is left out."""
    kept = set(names)
    found: list[str] = []
    for path, module in model.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        inner = isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not path
        if own and own <= kept and not inner:
            found.append(path)
            kept -= own
    return found


def set_trainable(model: nn.Module, parts: Collection[str]) -> None:
    """Let these parts train, and no others.

    Raises:
        ValueError: the model has no such part.
    """
    names = parts_of(model)
    for part in parts:
        if not names[part]:
            raise ValueError(
                f"trainable: expected parts that {type(model).__name__} has, "
                f"{', '.join(part for part in PARTS if names[part])}; got {part}"
            )
    chosen = {name for part in parts for name in names[part]}
    for name, parameter in model.named_parameters():
        is_chosen = name in chosen
        if is_chosen and not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                "trainable: quantized weights cannot train; expected lora for the LLM, and no tower"
            )
        parameter.requires_grad_(is_chosen)
