# SPDX-License-Identifier: Apache-2.0
"""What PRe keeps alive, and what may happen to a model between a forward pass and its backward."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from prereg_kernels import apply_pre, remove_pre
from tests.attached import NON_REENTRANT, anchor_of_pixels, compare
from tests.tiny import gradients, make_batch, tiny_llava


def make_model(checkpointing: bool = False, **overrides: Any) -> Any:
    model = tiny_llava()
    apply_pre(model, **overrides)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    return model


class Watch:
    """Weak references to the language model's input and a layer's output, and their memory."""

    def __init__(self, model: Any) -> None:
        self.tensors: dict[str, weakref.ref[Tensor]] = {}
        self.storages: dict[str, StorageWeakRef] = {}
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.see("embeddings", kwargs["inputs_embeds"]),
            with_kwargs=True,
        )
        model.model.language_model.layers[2].register_forward_hook(
            lambda module, args, output: self.see("output", output)
        )

    def see(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = weakref.ref(tensor)
        self.storages[name] = StorageWeakRef(tensor.untyped_storage())

    def alive(self) -> list[str]:
        gc.collect()
        assert self.tensors.keys() == self.storages.keys() == {"embeddings", "output"}
        tensors = [name for name, reference in self.tensors.items() if reference() is not None]
        return tensors + [f"{k}'s memory" for k, v in self.storages.items() if not v.expired()]


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "value": {"value_in_forward": True, "value_in_eval": True},
    "function": {"anchor": anchor_of_pixels, "anchor_features": 8},
    "two layers": {"layers": (1, 3)},
    "images": {"layers": (1, 3), "level": "global"},
    "encoder": {"anchor": "pre_projector"},
    "fraction": {"token_fraction": 0.5, "share_head": True, "layers": (1, 3)},
}


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_nothing_outlives_a_step(checkpointing: bool, overrides: dict[str, Any]) -> None:
    model = make_model(checkpointing, **overrides)
    watch = Watch(model)
    output = model(**make_batch())
    assert watch.alive() != []
    output.loss.backward()
    assert watch.alive() == []


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_a_dropped_output_frees_its_graph(checkpointing: bool, overrides: dict[str, Any]) -> None:
    model = make_model(checkpointing, **overrides)
    watch = Watch(model)
    output = model(**make_batch())
    assert watch.alive() != []
    del output
    assert watch.alive() == []


def test_evaluation_keeps_nothing() -> None:
    model = make_model(value_in_eval=True).eval()
    watch = Watch(model)
    output = model(**make_batch())
    assert model._prereg.metrics()["pre_loss"] != 0
    del output
    assert watch.alive() == []


@pytest.mark.parametrize("pending", (False, True))
def test_deepcopy_after_a_step(pending: bool) -> None:
    """The copy trains by itself, has heads of its own, and lets go of PRe by itself."""
    model, batch = make_model(), make_batch()
    loss = model(**batch).loss
    if not pending:
        loss.backward()
        del loss
    model.zero_grad()
    clone = copy.deepcopy(model)
    clone(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    ours = gradients(clone)
    assert ours["pre_heads.2.weight_0"].norm() > 0
    model(**batch).loss.backward()
    assert all(torch.equal(ours[name], x) for name, x in gradients(model).items())
    clone.pre_heads["2"].weight_0.data.zero_()
    assert model.pre_heads["2"].weight_0.abs().max() > 0
    remove_pre(clone)
    assert not hasattr(clone, "pre_heads")
    model.zero_grad()
    model(**batch).loss.backward()
    assert torch.equal(model.pre_heads["2"].weight_0.grad, ours["pre_heads.2.weight_0"])


def wrong_image_count(model: nn.Module) -> None:
    batch = make_batch((1, 1), seed=7)
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        model(**batch | {"pixel_values": batch["pixel_values"][:1]})


def raising_layer(model: Any) -> None:
    """After the tap, in the middle of the decoder."""

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.language_model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**make_batch((1, 0, 1), seed=7))
    handle.remove()


def no_input_ids(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 24))


def failing_evaluation(model: nn.Module) -> None:
    model.eval()
    raising_layer(model)
    model.train()


def evaluation(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(**make_batch((2,), seed=7))
    model.train()


def eval_mode(model: nn.Module) -> None:
    model.eval()


def heads_eval_mode(model: nn.Module) -> None:
    model.get_submodule("pre_heads").eval()


def another_forward(model: nn.Module) -> None:
    model(**make_batch((2,), seed=7))


EVENTS = (
    wrong_image_count, raising_layer, no_input_ids, failing_evaluation, evaluation, eval_mode,
    heads_eval_mode, another_forward,
)  # fmt: skip


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("value_in_eval", (False, True))
@pytest.mark.parametrize("event", EVENTS)
def test_between_forward_and_backward(checkpointing: bool, value_in_eval: bool, event: Any) -> None:
    model, batch = make_model(checkpointing, value_in_eval=value_in_eval), make_batch((1, 2))
    model(**batch).loss.backward()
    expected = gradients(model)
    assert expected["pre_heads.2.weight_1"].norm() > 0
    model.zero_grad()
    loss = model(**batch).loss
    event(model)
    loss.backward()
    compare(gradients(model), expected)


@pytest.mark.parametrize("event", (wrong_image_count, raising_layer, failing_evaluation))
def test_a_failed_forward_leaves_nothing_behind(event: Any) -> None:
    model = make_model(value_in_eval=True)
    watch = Watch(model)
    for _ in range(2):
        event(model)
    model(**make_batch()).loss.backward()
    assert watch.alive() == []


@pytest.mark.parametrize("inner", (False, True), ids=("around", "around and inside"))
@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS)
def test_a_checkpoint_around_the_call(
    overrides: dict[str, Any], use_reentrant: bool, inner: bool
) -> None:
    """Backward runs the model again: the same draws, and no pass is counted twice."""

    def train(wrapped: bool) -> tuple[dict[str, Tensor], int, list[dict[str, float]]]:
        model, figures = make_model(wrapped and inner, **overrides), []
        pre, start = model._prereg, torch.zeros((), requires_grad=True)
        for images in ((1, 2), (2, 0)):
            batch = make_batch(images)
            items = (batch["labels"] != -100).sum() * 2

            def call(x: Tensor, batch: Any = batch, items: Tensor = items) -> Tensor:
                return model(**batch, num_items_in_batch=items).loss + x

            loss = checkpoint(call, start, use_reentrant=use_reentrant) if wrapped else call(start)
            loss.backward()
            figures.append(pre.metrics())
        return gradients(model), pre.passes, figures

    ours, expected = train(True), train(False)
    assert ours[1:] == expected[1:] and ours[1] == 2
    assert all(torch.equal(ours[0][name], x) for name, x in expected[0].items())


def test_a_checkpoint_around_a_call_without_labels() -> None:
    """The term on the handle stays the one that the user holds."""
    model, batch = make_model(), make_batch()
    del batch["labels"]
    logits = checkpoint(lambda: model(**batch).logits, use_reentrant=False)
    term = model._prereg.loss
    (logits.mean() + term).backward()
    assert model._prereg.loss is term
    assert model._prereg.metrics()["pre_loss"] != 0
