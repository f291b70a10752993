# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing with use_reentrant=True: the gradients of a step without checkpointing.

A layer runs without grad first. Its second run, in backward, adds PRe's gradient.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prereg_kernels import apply_pre
from tests.attached import anchor_of_pixels, compare
from tests.tiny import WIDTH, gradients, make_batch, tiny_llava


def anchor_of_some(inputs: Mapping[str, Any]) -> Tensor:
    """(N, 8): none of a batch of text alone."""
    return anchor_of_pixels(inputs) if "pixel_values" in inputs else torch.zeros(0, 8)


REENTRANT = {"use_reentrant": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "several layers": {"layers": (1, 3)},
    "all layers": {"layers": (1, 2, 3, 4)},
    "shared head": {"layers": (1, 3), "share_head": True},
    "images": {"level": "global"},
    "images, several layers": {"level": "global", "layers": (1, 3)},
    "fraction": {"token_fraction": 0.5, "layers": (1, 3)},
    "function": {"anchor": anchor_of_some, "anchor_features": 8},
    "encoder": {"anchor": "pre_projector"},
    "smooth l1": {"loss": "smooth_l1", "normalize": "layer"},
    "value": {"value_in_forward": True},
    "tap": {"gradient": "tap"},
    "tap, images": {"gradient": "tap", "level": "global"},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
Steps = Callable[[Any, Any], None]


def one_step(model: Any, pre: Any) -> None:
    model(**make_batch((1, 2))).loss.backward()


def accumulated(model: Any, pre: Any) -> None:
    batches = make_batch((1, 2), seed=1), make_batch((0, 0), seed=2), make_batch((0, 1), seed=3)
    pre.denominator = sum(pre.count(batch) for batch in batches)
    for batch in batches:
        model(**batch).loss.backward()


def two_forwards_then_two_backwards(model: Any, pre: Any) -> None:
    losses = [model(**make_batch((1, 2), seed=seed)).loss for seed in (1, 2)]
    for loss in losses:
        loss.backward()


def a_sum_of_two(model: Any, pre: Any) -> None:
    sum(model(**make_batch((1, 2), seed=seed)).loss for seed in (1, 2)).backward()


def a_scaled_loss(model: Any, pre: Any) -> None:
    pre.loss_scale = 3.0
    (model(**make_batch((1, 2))).loss * 3.0).backward()


def text_alone(model: Any, pre: Any) -> None:
    model(**make_batch((0, 0))).loss.backward()


STEPS = (
    one_step, accumulated, two_forwards_then_two_backwards, a_sum_of_two, a_scaled_loss, text_alone,
)  # fmt: skip


def run(
    steps: Steps, settings: dict[str, Any], checkpointing: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    model = tiny_llava()
    pre = apply_pre(model, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable(REENTRANT)
    steps(model, pre)
    return gradients(model), pre.metrics()


@every_setting
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: steps.__name__)
def test_gradients(steps: Steps, settings: dict[str, Any]) -> None:
    ours, figures = run(steps, settings, True)
    expected, expected_figures = run(steps, settings, False)
    heads = [x for name, x in expected.items() if "pre_heads" in name]
    assert all(x.norm() > 1e-6 for x in heads) == (steps is not text_alone)
    compare(ours, expected)
    assert figures == pytest.approx(expected_figures, rel=1e-5, abs=1e-7)


@every_setting
def test_a_graph_that_is_kept(settings: dict[str, Any]) -> None:
    """A second backward pass adds the same again."""
    steps: dict[bool, list[dict[str, Tensor]]] = {}
    for checkpointing in (True, False):
        model = tiny_llava()
        apply_pre(model, **settings)
        if checkpointing:
            model.gradient_checkpointing_enable(REENTRANT)
        loss = model(**make_batch((1, 2))).loss
        loss.backward(retain_graph=True)
        first = gradients(model)
        loss.backward()
        steps[checkpointing] = [first, gradients(model)]
    for ours, expected in zip(steps[True], steps[False], strict=True):
        compare(ours, expected)


@pytest.mark.parametrize("level", ("patch", "global"))
def test_a_loss_of_the_callers(level: Any) -> None:
    """From the logits, without the labels; and with `pre.loss` added, counted once."""
    found = []
    for checkpointing in (True, False):
        for adds in (True, False):
            model = tiny_llava()
            pre = apply_pre(model, level=level)
            if checkpointing:
                model.gradient_checkpointing_enable(REENTRANT)
            batch = make_batch((1, 2))
            labels = batch.pop("labels")
            logits = model(**batch).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            (loss + pre.loss if adds else loss).backward()
            found.append(gradients(model))
    for ours in found[:-1]:
        compare(ours, found[-1])


def test_a_loss_without_the_term() -> None:
    model, batch = tiny_llava(), make_batch()
    apply_pre(model)
    model.gradient_checkpointing_enable(REENTRANT)
    output = model(**batch)
    with pytest.raises(RuntimeError, match="the backward pass came from a loss without the term"):
        output.logits.sum().backward()


def reentrant_llava(**settings: Any) -> tuple[Any, Any]:
    model = tiny_llava()
    pre = apply_pre(model, **settings)
    model.gradient_checkpointing_enable(REENTRANT)
    return model, pre


@pytest.mark.parametrize("level", ("patch", "global"))
@pytest.mark.parametrize("first", (False, True), ids=("alone", "after the model's loss"))
def test_a_term_that_is_differentiated_alone(level: Any, first: bool) -> None:
    """Nothing runs the layer again then."""
    model = tiny_llava()
    pre = apply_pre(model, level=level)
    wrap(model, 1, reentrant)
    batch = make_batch((1, 2))
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits.flatten(0, 1)
    if first:
        torch.nn.functional.cross_entropy(logits, labels.flatten()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has not run it again, so PRe's gradient is lost"):
        pre.loss.backward()


@pytest.mark.parametrize("level", ("patch", "global"))
def test_a_layer_without_grad_of_the_callers(level: Any) -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    apply_pre(model, level=level)
    wrap(model, 1, lambda call, hidden: torch.no_grad()(call)(hidden))
    with pytest.raises(RuntimeError, match="has not run it again, so PRe's gradient is lost"):
        model(**batch).loss.backward()


def test_a_gradient_counts_in_its_own_backward_pass() -> None:
    """What a kept graph is differentiated by next has no term."""
    model, _ = reentrant_llava(gradient="loss")
    output = model(**make_batch((1, 2)))
    output.loss.backward(retain_graph=True)
    model.zero_grad()
    output.logits.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.pre_heads.parameters())


def test_nothing_is_held_after_backward() -> None:
    model, _ = reentrant_llava()
    kept: list[Any] = []
    entry = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(weakref.ref(kwargs["inputs_embeds"])),
        with_kwargs=True,
    )
    loss = model(**make_batch((1, 2))).loss
    entry.remove()
    loss.backward()
    gc.collect()
    assert len(kept) == 1 and kept[0]() is None and loss.grad_fn is not None


def test_a_call_of_the_decoder_takes_no_other_call_for_its_own() -> None:
    """It has no term, and the model's call has the one that it would have."""
    expected, _ = run(one_step, {}, True)
    model, _ = reentrant_llava()
    decoder = model.model.language_model
    states = torch.randn(2, 14, WIDTH, generator=torch.Generator().manual_seed(0))
    loss = model(**make_batch((1, 2))).loss
    with pytest.warns(UserWarning, match="ran outside of a call"):
        beside = decoder(inputs_embeds=states.requires_grad_()).last_hidden_state
    decoder.zero_grad()
    beside.sum().backward()
    model.zero_grad()
    loss.backward()
    compare(gradients(model), expected)


def test_nothing_below_needs_a_gradient() -> None:
    model, batch = tiny_llava().requires_grad_(False), make_batch()
    model.lm_head.requires_grad_(True)
    apply_pre(model)
    wrap(model, 1, reentrant)
    with pytest.raises(RuntimeError, match=r"call model\.enable_input_require_grads\(\)"):
        model(**batch, use_cache=False)
    model.enable_input_require_grads()
    model(**batch, use_cache=False).loss.backward()


def test_a_checkpoint_that_offloads_its_input() -> None:
    """As Unsloth's: the second run's input is another tensor."""
    found = []
    for offloads in (True, False):
        model = tiny_llava()
        apply_pre(model)
        if offloads:
            wrap(model, 1, offloading)
        model(**make_batch((1, 2)), use_cache=False).loss.backward()
        found.append(gradients(model))
    compare(*found)


class Offloading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, hidden: Tensor) -> Tensor:
        ctx.function, ctx.hidden = function, hidden.detach().clone()
        with torch.no_grad():
            return function(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        hidden = ctx.hidden.clone().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden)
        torch.autograd.backward(output, gradient)
        return None, hidden.grad


def offloading(call: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return Offloading.apply(call, hidden)


def reentrant(call: Callable[[Tensor], Tensor], hidden: Tensor) -> Any:
    """A layer's call, its hooks inside of the checkpoint, as in transformers before 5.24."""
    return checkpoint(call, hidden, use_reentrant=True)


def wrap(model: Any, number: int, around: Callable[..., Any]) -> None:
    """A layer's call, hooks and all, within another."""
    layers = model.model.language_model.layers
    inner = layers[number]

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__.update(inner.__dict__)
            self.__dict__["inner"] = inner

        def __call__(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            return around(lambda x: inner(x, **kwargs), hidden)

    layers._modules[str(number)] = Wrapped()


def test_the_graph_owns_what_waits() -> None:
    """A pass without a backward leaves nothing behind."""
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    model.gradient_checkpointing_enable(REENTRANT)
    waiting = pre._state.model.forward._hooks.taps._second_runs._waiting
    for _ in range(3):
        model(**batch)
    assert [run() for run in waiting if run() is not None] == []


def test_a_checkpoint_around_the_call_and_within() -> None:
    expected, _ = run(one_step, {}, False)
    model, batch = tiny_llava(), make_batch((1, 2))
    apply_pre(model)
    model.gradient_checkpointing_enable(REENTRANT)
    start = torch.zeros((), requires_grad=True)
    checkpoint(lambda x: model(**batch).loss + x, start, use_reentrant=True).backward()
    compare(gradients(model), expected)
