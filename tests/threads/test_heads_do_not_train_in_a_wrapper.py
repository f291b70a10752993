# SPDX-License-Identifier: Apache-2.0
"""LoRA trains, the loss falls, and the heads of PRe never move; there is no error.

Some wrappers call `model.forward(...)`, which goes past hooks on the model; others call the part of
the model that has no language-model head, and compute the loss themselves. Both train like the
model's own call.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prereg_kernels import apply_pre, remove_pre
from tests.attach.families.batches import make_batch
from tests.attach.families.models import make_model
from tests.attached import NON_REENTRANT, compare, eager_term
from tests.tiny import gradients, tiny_llava
from tests.tiny import make_batch as tiny_batch


class PastHooks(nn.Module):
    """As PEFT before 0.21 calls a model with task_type="CAUSAL_LM"."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def train(model: nn.Module, call: Any, batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    call(**batch).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize(
    "settings", ({}, {"level": "global"}, {"token_fraction": 0.5}), ids=("patch", "global", "part")
)
@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))
def test_forward_is_the_call(name: str, settings: dict[str, Any], checkpointing: bool) -> None:
    model = make_model(name)
    batch = make_batch(name, model).inputs
    pre = apply_pre(model, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    expected, figures = train(model, model, batch), pre.metrics()
    pre.passes = 0
    assert torch.equal(model.forward(**batch).loss, model(**batch).loss)
    pre.passes = 0
    ours = train(model, PastHooks(model), batch)
    assert all(torch.equal(ours[name], x) for name, x in expected.items())
    assert pre.metrics() == figures and pre.passes == 1


def test_the_definition() -> None:
    model, batch = tiny_llava(), tiny_batch((1, 2))
    pre = apply_pre(model)
    ours = train(model, model.forward, batch)
    model.zero_grad()
    heads = pre.heads
    remove_pre(model)
    lm, term = eager_term(model, batch, heads)
    (lm + 0.5 * term).backward()
    expected = gradients(model)
    expected |= {f"pre_heads.2.{n}": p.grad for n, p in heads[2].named_parameters()}
    compare(ours, expected)


@pytest.mark.parametrize("settings", ({}, {"level": "global"}), ids=("patch", "global"))
def test_the_part_without_a_head_for_words(settings: dict[str, Any]) -> None:
    """Its loss is the caller's, and backward adds the term's gradient by itself."""
    model, batch = tiny_llava(), tiny_batch((1, 2))
    pre = apply_pre(model, **settings)
    labels = batch.pop("labels")
    states = model.model(**batch).last_hidden_state
    model.loss_function(model.lm_head(states), labels, vocab_size=40).backward()
    ours = gradients(model)
    batch["labels"] = labels
    compare(ours, train(model, model, batch))
    assert pre.metrics()["pre_loss"] < 0


def test_copies_call_their_own_heads() -> None:
    model, batch = tiny_llava(), tiny_batch()
    apply_pre(model)
    clones = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = train(model, model, batch)
    model.zero_grad()
    for clone in clones:
        ours = train(clone, PastHooks(clone), batch)
        assert all(torch.equal(ours[name], x) for name, x in expected.items())
        assert all(p.grad is None for p in model.parameters())


def test_compiled() -> None:
    model, batch = tiny_llava(), tiny_batch((0, 0))
    apply_pre(model)
    expected = train(model, model, batch)
    call = torch.compile(PastHooks(model), backend="aot_eager", fullgraph=True)
    compare(train(model, call, batch), expected)


def test_the_arguments_of_forward_can_be_asked_for() -> None:
    """As trainers do, to see which columns of a data set a model takes."""
    model = tiny_llava()
    before = inspect.signature(model.forward)
    apply_pre(model)
    assert inspect.signature(model.forward) == before
    remove_pre(model)
    assert "forward" not in vars(model)


def test_a_forward_that_somebody_puts_in_place_of_it() -> None:
    """As kernels do that patch one model: its hooks begin the pass; removing PRe leaves it."""
    model, batch = tiny_llava(), tiny_batch()
    apply_pre(model)
    expected = train(model, model, batch)
    calls: list[int] = []

    def patched(**kwargs: Any) -> Any:
        calls.append(1)
        return type(model).forward(model, **kwargs)

    model.forward = patched
    ours = train(model, model, batch)
    assert calls and all(torch.equal(ours[name], x) for name, x in expected.items())
    remove_pre(model)
    assert model.forward is patched


def test_a_forward_that_wraps_ours_outlives_it() -> None:
    model, batch = tiny_llava(), tiny_batch()
    plain = model(**batch).loss
    apply_pre(model)
    ours = model.forward
    model.forward = lambda **kwargs: ours(**kwargs)
    expected = train(model, model, batch)
    assert expected["pre_heads.2.weight_0"].norm() > 0
    remove_pre(model)
    assert torch.equal(model(**batch).loss, plain)


def test_ctrl_c_in_forward_leaves_no_call_behind() -> None:
    """Backward would take it for the one that it runs in."""
    model, batch = tiny_llava(), tiny_batch()
    apply_pre(model)
    model.gradient_checkpointing_enable(NON_REENTRANT)
    expected = train(model, model, batch)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    for call in (model, model.forward):
        handle = model.model.language_model.layers[2].register_forward_pre_hook(interrupt)
        loss = None
        with pytest.raises(KeyboardInterrupt):
            loss = call(**batch)
        handle.remove()
        assert loss is None
        compare(train(model, model, batch), expected)


def test_a_call_that_goes_past_all_of_it_is_told() -> None:
    """In the first step: the decoder alone knows no visual token."""
    model, batch = tiny_llava(), tiny_batch()
    apply_pre(model)
    embeddings = model.get_input_embeddings()(batch["input_ids"].clamp(max=38))
    with pytest.warns(UserWarning, match="layer 2 ran outside of a call of the LlavaForCond"):
        states = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
    states.sum().backward()
    with torch.no_grad():
        model.model.language_model(inputs_embeds=embeddings)
