# SPDX-License-Identifier: Apache-2.0
"""A model with PRe attached beside the same term by the model's own activations and eager code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from prereg_kernels import apply_pre, eager_pre_loss, remove_pre
from tests.helpers import relative_error
from tests.releases import HERE
from tests.tiny import IMAGE_TOKEN, gradients, tiny_llava

NON_REENTRANT = {"use_reentrant": False}
# Whether checkpointed layers run again with their hooks, as before transformers 5.24
HOOKS_RUN_AGAIN = GradientCheckpointingLayer.__call__ is not nn.Module.__call__


def anchor_of_pixels(inputs: Mapping[str, Any]) -> Tensor:
    """(N, 8): eight numbers of each patch, in the order of the visual tokens."""
    pixels = inputs["pixel_values"].unfold(2, 8, 8).unfold(3, 8, 8)
    return pixels[:, 0].reshape(-1, 64)[:, ::8]


@dataclass(frozen=True)
class Place:
    """Where a model keeps what PRe reads.

    Attributes:
        language_model: path of what gets `inputs_embeds`; None: `get_decoder()`.
        layers: name of its list of layers.
        is_merged_inside: the input of its first layer is what holds the visual features.
        read: (rows, length, D), of a layer's output, and of the input that holds the features.
    """

    language_model: str | None = None
    layers: str = "layers"
    is_merged_inside: bool = False
    read: Callable[[Tensor], Tensor] = lambda output: output


@contextmanager
def seen(model: Any, place: Place = Place()) -> Iterator[dict[int, Tensor]]:
    """Fills in {layer: its output}, before any later norm; 0 is what enters them."""
    states: dict[int, Tensor] = {}

    def see_embeddings(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        states[0] = inputs["inputs_embeds"]

    def see_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        states[0] = place.read((*args, *kwargs.values())[0])

    def see_output(number: int) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            states[number] = place.read(whole)
            if HERE >= (5, 0) or states[number] is not whole:
                return None
            copy = whole.clone()  # for Qwen3-VL's next step, which writes into it
            return (copy, *output[1:]) if isinstance(output, tuple) else copy

        return see

    path = place.language_model
    language_model = model.get_decoder() if path is None else model.get_submodule(path)
    if not hasattr(language_model, place.layers):  # Idefics' of before transformers 5
        language_model = language_model.text_model
    layers = getattr(language_model, place.layers)
    if place.is_merged_inside:
        handles = [layers[0].register_forward_pre_hook(see_input, with_kwargs=True)]
    else:
        handles = [language_model.register_forward_pre_hook(see_embeddings, with_kwargs=True)]
    handles += [
        layer.register_forward_hook(see_output(number)) for number, layer in enumerate(layers, 1)
    ]
    yield states
    for handle in handles:
        handle.remove()


def eager_term(
    model: nn.Module,
    batch: Mapping[str, Any],
    heads: Mapping[int, Any],
    mask: Tensor | None = None,
    *,
    anchor: Callable[[Mapping[str, Any]], Tensor] | None = None,
    chosen: Tensor | None = None,
    images: Sequence[int] | None = None,
    place: Place = Place(),
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(L_LM, L_PRe), by the outputs of the model's layers and the definition of the loss.

    `chosen`: of the visual tokens, those that count. `images`: the visual tokens of each image,
    where their means count.
    """
    with seen(model, place) as states:
        output = model(**batch)
    mask = batch["input_ids"] == IMAGE_TOKEN if mask is None else mask
    anchors = states[0][mask] if anchor is None else anchor(batch)

    def reduced(rows: Tensor) -> Tensor:
        if chosen is not None:
            return rows[chosen]
        if not images:
            return rows
        return torch.stack([part.mean(dim=0) for part in rows.split(list(images))])

    losses = [
        eager_pre_loss(
            reduced(states[layer][mask]), reduced(anchors), head.weights, head.biases,
            activation=head.activation, **options,
        )
        for layer, head in heads.items()
    ]  # fmt: skip
    return output.loss, torch.stack(losses).mean()


def compare(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal up to the rounding of two float32 passes, where a gradient is more than rounding."""
    assert ours.keys() == expected.keys()
    assert sum(x.norm().item() > 1e-6 for x in expected.values()) > 20
    for name, x in expected.items():
        # A key's bias moves all scores of a query alike, and softmax does not see that.
        rounding = 1e-4 if name.endswith(("k_proj.bias", "key.bias")) else 1e-6
        if x.norm() > rounding:
            assert relative_error(ours[name], x) < 2e-4, name
        else:
            assert ours[name].norm() < 10 * rounding, name


def both(
    batch: Mapping[str, Any],
    *,
    make: Callable[[], Any] = tiny_llava,
    mask: Tensor | None = None,
    checkpointing: bool = False,
    autocast: bool = False,
    upcast: torch.dtype | None = None,
    anchor_rows: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
    chosen: Tensor | None = None,
    images: Sequence[int] | None = None,
    place: Place = Place(),
    **overrides: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float], tuple[float, float]]:
    """Gradients with PRe attached, the reference's, the metrics, and the reference's values.

    `mask`: the visual positions, where they are not those of `IMAGE_TOKEN`. `anchor_rows`: the
    reference's anchor, of the model and the batch. `chosen`, `images`, `place`: as for
    `eager_term`.
    """
    model = make()
    pre = apply_pre(model, **overrides)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(**batch).loss
    loss.backward()
    ours, metrics = gradients(model), pre.metrics()
    heads = pre.heads
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_disable()
    remove_pre(model)
    options = {k: v for k, v in overrides.items() if k in ("loss", "normalize")}
    anchor = overrides.get("anchor") if anchor_rows is None else partial(anchor_rows, model)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        lm, term = eager_term(
            model, batch, heads, mask, upcast=upcast, anchor=anchor, chosen=chosen, images=images,
            place=place, **options,
        )  # fmt: skip
    (lm + pre.config.weight * term).backward()
    expected = gradients(model)
    model.zero_grad()
    for layer, head in heads.items():
        name = "shared" if pre.config.share_head else layer
        expected |= {f"pre_heads.{name}.{n}": p.grad for n, p in head.named_parameters()}
    return ours, expected, metrics, (lm.item(), term.item())
