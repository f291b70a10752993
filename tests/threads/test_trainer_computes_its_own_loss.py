# SPDX-License-Identifier: Apache-2.0
"""My trainer takes the labels out and computes the loss from the logits: the heads never train.

The term was in a loss that nobody used. Backward adds its gradient by itself now, at layer l, where
the call had no labels and the caller's loss does not hold the term.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre, eager_pre_loss
from prereg_kernels.attach.handle import PRe
from tests.attached import NON_REENTRANT, compare, seen
from tests.tiny import IMAGE_TOKEN, PATCHES, gradients, make_batch, tiny_llava

SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "two layers": {"layers": (1, 3), "weight": 2.0},
    "global": {"level": "global"},
    "value": {"value_in_forward": True},
}


def unlabelled(images: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    batch = make_batch(images)
    del batch["labels"]
    return batch


def loss_of(output: Any) -> Tensor:
    return output.logits.log_softmax(dim=-1)[..., 5].mean().neg()


def reference(settings: dict[str, Any], factor: float = 1.0) -> dict[str, Tensor]:
    """By the definition, of states from hooks that are the test's."""
    model, batch = tiny_llava(), unlabelled()
    pre = apply_pre(model, gradient="loss", **settings)
    mask = batch["input_ids"] == IMAGE_TOKEN
    sizes = [PATCHES] * 3

    def rows(x: Tensor) -> Tensor:
        x = x[mask]
        if pre.config.level == "patch":
            return x
        return torch.stack([part.mean(dim=0) for part in x.split(sizes)])

    with seen(model) as states:
        loss = loss_of(model(**batch))
    terms = [
        eager_pre_loss(rows(states[n]), rows(states[0]), head.weights, head.biases)
        for n, head in pre.heads.items()
    ]
    (loss + factor * pre.config.weight * torch.stack(terms).mean()).backward()
    return gradients(model)


def attached(settings: dict[str, Any], checkpointing: bool = False) -> tuple[Any, PRe]:
    model = tiny_llava()
    pre = apply_pre(model, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    return model, pre


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("gradient", ("auto", "tap"))
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_term_has_its_gradient(
    settings: dict[str, Any], gradient: str, checkpointing: bool
) -> None:
    model, pre = attached(settings | {"gradient": gradient}, checkpointing)
    loss_of(model(**unlabelled())).backward()
    compare(gradients(model), reference(settings))
    assert pre.metrics()["pre_loss"] != 0
    model(**unlabelled())  # and the next step has no complaint


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_loss_that_holds_the_term_has_it_once(settings: dict[str, Any]) -> None:
    """At the scale of that loss."""
    model, pre = attached(settings)
    loss = loss_of(model(**unlabelled()))
    (loss + 3.0 * pre.loss).backward()
    compare(gradients(model), reference(settings, 3.0))


@pytest.mark.parametrize("first", ("loss", "term"))
def test_two_backward_passes_have_it_once(first: str) -> None:
    model, pre = attached({})
    loss = loss_of(model(**unlabelled()))
    parts = [loss, pre.loss] if first == "loss" else [pre.loss, loss]
    parts[0].backward(retain_graph=True)
    parts[1].backward()
    compare(gradients(model), reference({}))


@pytest.mark.parametrize("scale", (4.0, torch.tensor(4.0)), ids=("number", "tensor"))
def test_the_scale_of_the_loop(scale: Any) -> None:
    """As a GradScaler's, by which the loop multiplies its loss and divides the gradients."""
    model, pre = attached({})
    pre.loss_scale = scale
    (loss_of(model(**unlabelled())) * 4.0).backward()
    compare({n: x / 4 for n, x in gradients(model).items()}, reference({}))


def test_the_tap_by_itself_leaves_the_models_loss_alone() -> None:
    """With labels, at any accumulation: the term has its share of them."""
    batch = make_batch((1, 2))
    items = 3 * (batch["labels"][:, 1:] != -100).sum()
    model, pre = attached({"gradient": "tap"})
    loss = model(**batch, num_items_in_batch=items).loss
    assert pre.loss is None
    loss.backward()
    ours = gradients(model)
    model, _ = attached({})
    model(**batch, num_items_in_batch=items).loss.backward()
    compare(ours, gradients(model))


@pytest.mark.parametrize("settings", ({}, {"level": "global"}), ids=("patch", "global"))
def test_with_a_decoder_that_is_frozen_below(settings: dict[str, Any]) -> None:
    model, _ = attached(settings)
    for name, p in model.named_parameters():
        p.requires_grad_("pre_heads" in name or "layers.3" in name)
    loss_of(model(**unlabelled())).backward()
    ours = gradients(model)
    expected = reference(settings)
    for name, p in model.pre_heads.named_parameters():
        assert p.grad is not None and p.grad.norm() > 0
        torch.testing.assert_close(ours[f"pre_heads.{name}"], expected[f"pre_heads.{name}"])


def test_compiled() -> None:
    """Layer by layer and whole; a graph cannot see whether its loss is used."""
    for whole in (False, True):
        model, _ = attached({})
        batch = unlabelled() if not whole else unlabelled((0, 0))
        call = model
        if whole:
            call = torch.compile(model, backend="aot_eager")
        else:
            for layer in model.get_decoder().layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        loss_of(call(**batch)).backward()
        plain, _ = attached({})
        loss_of(plain(**batch)).backward()
        compare(gradients(model), gradients(plain))


def test_the_share_of_a_step_that_the_call_does_not_show() -> None:
    model, pre = attached({})
    with pytest.raises(ValueError, match=r"labels: .*num_items_in_batch.*pre\.denominator"):
        model(**unlabelled(), num_items_in_batch=torch.tensor(9))
    pre.denominator = 24
    loss_of(model(**unlabelled(), num_items_in_batch=torch.tensor(9))).backward()
    compare(gradients(model), reference({}, 12 / 24))


def test_unknown_settings() -> None:
    with pytest.raises(ValueError, match="gradient: expected one of auto, loss, tap; got 'both'"):
        apply_pre(tiny_llava(), gradient="both")
