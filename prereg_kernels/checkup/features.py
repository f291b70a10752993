# SPDX-License-Identifier: Apache-2.0
"""Hidden states at the visual tokens of every layer, through hooks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels.attach.anchors import llm_width
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.resolver import resolve


@torch.no_grad()
def visual_features(
    model: nn.Module, batch: Mapping[str, Any], family: Family | None = None
) -> list[Tensor]:
    """Run the model on a batch and keep the visual tokens' states of every layer.

    Nothing else is kept: no other position, no cache, and logits of one position only.

    Args:
        model: of a supported family. It runs as it is; call `model.eval()` first.
        batch: keyword arguments of its forward, `input_ids` among them; `labels` are left out.
        family: where a model outside of the table keeps things, as `apply_pre` takes it.

    Returns:
        One (N, D) tensor a layer, layer 0 being the LLM's input and layer l the output of decoder
        layer l (as in Hugging Face's `hidden_states`, except that the last is taken before the
        final norm); rows in the order of the visual tokens in `input_ids`.

    Example:
        >>> from prereg_kernels.checkup import visual_features
        >>> features = visual_features(model.eval(), batch)
        >>> len(features), features[0].shape  # the LLM's input and its 4 layers; 8 visual tokens
        (5, torch.Size([8, 24]))
    """
    family = resolve(model, family).family
    visual = visual_mask(model, batch, family)
    layers: list[Tensor] = []

    entering: list[Tensor] = []  # what the decoder gets, or the layer where the features are added
    decoder, entry = family.layers_of(model), family.entry_of(model)

    def rows(states: Any) -> Tensor:
        states = family.states_of(states, width)
        return states[visual.to(states.device)]

    def see_embeddings(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if entry is None and kwargs.get("inputs_embeds") is not None:
            entering.append(kwargs["inputs_embeds"][visual.to(kwargs["inputs_embeds"].device)])

    def see_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not entering:
            entering.append(rows(args[0] if args else kwargs["hidden_states"]))

    width = llm_width(family.embeddings_of(model))
    handles = [
        family.language_model_of(model).register_forward_pre_hook(see_embeddings, with_kwargs=True),
        decoder[entry or 0].register_forward_pre_hook(see_input, with_kwargs=True),
        *(
            layer.register_forward_hook(lambda module, args, output: layers.append(rows(output)))
            for layer in decoder
        ),
    ]
    accepted = inspect.signature(model.forward).parameters
    frugal = {"use_cache": False, "logits_to_keep": 1}
    arguments = {name: x for name, x in frugal.items() if name in accepted} | dict(batch)
    arguments.pop("labels", None)  # a training batch's: no loss is needed, and one logit has none
    try:
        model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return [*entering, *layers]


def visual_mask(model: nn.Module, batch: Mapping[str, Any], family: Family | None = None) -> Tensor:
    """Bool, (rows, length): where a batch's tokens are visual. ValueError as `apply_pre`."""
    family = resolve(model, family).family
    return family.shown(family.marked(model, batch), batch.get("attention_mask"))
