# SPDX-License-Identifier: Apache-2.0
"""Ranks that have some of the decoder's layers: an error that says so, before anything trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prereg_kernels import apply_pre
from prereg_kernels.attach.stages import SAME_STAGE
from tests.attached import eager_term
from tests.helpers import relative_error
from tests.tiny import LAYERS, PATCHES, WIDTH, make_batch, tiny_llava

try:
    from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
except ModuleNotFoundError:  # releases that have no stages, where other code makes them

    class PipelineIdentityLayer(nn.Identity):  # type: ignore[no-redef]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if args else next(iter(kwargs.values()))


def second_stage(model: Any) -> None:
    """As transformers has it: a stage's layers, and identities in place of the others'."""
    layers = model.get_decoder().layers
    for number in range(2):
        layers[number] = PipelineIdentityLayer()


def shorter(model: Any) -> None:
    """As loops that cut a model themselves."""
    del model.get_decoder().layers[:2]


@pytest.mark.parametrize(
    "cut, message",
    (
        (second_stage, r"layers 1 to 3 on this rank, got nn\.Identity in place of number 1"),
        (shorter, f"expected its {LAYERS} decoder layers, got 2 of them"),
    ),
)
def test_a_model_that_becomes_a_later_stage(cut: Callable[[Any], None], message: str) -> None:
    """Hidden states enter it, which would be taken for the anchor."""
    model = tiny_llava()
    pre, batch = apply_pre(model, layers=3), make_batch()
    cut(model)
    pre.next_visual_mask = batch["input_ids"] == model.config.image_token_id
    states = torch.randn(*batch["input_ids"].shape, WIDTH)
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=states, labels=batch["labels"])


@pytest.mark.parametrize("cut", (second_stage, shorter))
def test_a_later_stage(cut: Callable[[Any], None]) -> None:
    model = tiny_llava()
    cut(model)
    with pytest.raises(ValueError, match="no list of 4 layers, but one with 2 of them") as error:
        apply_pre(model, layers=2)
    assert SAME_STAGE in str(error.value) and not hasattr(model, "pre_heads")


def test_the_first_stage_may_have_the_layer() -> None:
    """What follows it is no concern of PRe's; the loss comes from there."""
    model = tiny_llava()
    layers = model.get_decoder().layers
    for number in (2, 3):
        layers[number] = PipelineIdentityLayer()
    pre, batch = apply_pre(model, layers=2), make_batch()
    del batch["labels"]
    model.model(**batch).last_hidden_state.sum().backward()  # as by what the next stage sends back
    assert pre.metrics()["visual_tokens"] == 2 * PATCHES
    ours = [p.grad.clone() for p in pre.heads[2].parameters()]
    pre.heads[2].zero_grad()
    _, term = eager_term(tiny_llava(), make_batch(), pre.heads)
    (pre.config.weight * term).backward()
    for gradient, p in zip(ours, pre.heads[2].parameters(), strict=True):
        assert relative_error(gradient, p.grad) < 1e-5


def test_a_stage_without_the_layer() -> None:
    model = tiny_llava()
    apply_pre(model, layers=3)
    decoder = model.get_decoder()
    decoder.layers[2] = nn.Identity()
    with pytest.raises(ValueError, match="place of number 3"):
        model(**make_batch())
