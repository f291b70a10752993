# SPDX-License-Identifier: Apache-2.0
"""torch.compile of a model with PRe: the gradients of eager, and no graph break of PRe's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    _CHECKPOINT_PREFIX,
    CheckpointImpl,
    checkpoint_wrapper,
)

from prereg_kernels import apply_pre
from tests.attach.families.batches import make_batch
from tests.attach.families.models import make_model
from tests.attached import HOOKS_RUN_AGAIN, NON_REENTRANT, compare
from tests.tiny import gradients

REST = pytest.mark.compiled  # no other kind of graph than the test's first case

SETTINGS: dict[str, dict[str, Any]] = {
    "two layers": {"layers": (1, 3)},
    "value": {"value_in_forward": True},
    # These two read rows by number; the graph breaks before the model, which finds it out.
    "token_fraction": {"token_fraction": 0.5},
    "global": {"level": "global"},
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Wrapper(nn.Module):
    """As PEFT and DDP: its call is the model's, in one graph with the model's hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


def whole(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


def wrapped(model: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(Wrapper(model), backend=backend)


def layers(model: Any) -> Any:
    """PRe's own layer, and one that has no hook of PRe's."""
    for layer in model.get_decoder().layers[1:3]:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


def train(model: Any, call: Any, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of a step."""
    model.zero_grad()
    loss = call(**batch).loss
    loss.backward()
    return loss.item(), gradients(model)


def check(
    name: str, scene: str, compiled: Callable[[Any], Any], make: Any = make_model, **overrides: Any
) -> int:
    """Compare with eager; returns the number of graph breaks."""
    model = make(name)
    batch = make_batch(name, model, scene).inputs
    pre = apply_pre(model, **overrides)
    loss, expected = train(model, model, batch)
    figures = pre.metrics()
    model = make(name)
    model(**batch)  # transformers puts hooks of its own on the model in the first call
    pre = apply_pre(model, **overrides)
    counters.clear()
    compiled_loss, ours = train(model, compiled(model), batch)
    compare(ours, expected)
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert pre.metrics() == pytest.approx(figures, rel=1e-5)
    return sum(counters["graph_break"].values())


def breaks_of_plain(name: str, scene: str, make: Any = make_model) -> int:
    model = make(name)
    batch = make_batch(name, model, scene).inputs
    model(**batch)
    counters.clear()
    wrapped(model, "eager")(**batch)
    torch._dynamo.reset()
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    "name, compiled",
    (
        ("llava", wrapped),
        pytest.param("llava", whole, marks=REST),
        pytest.param("qwen2_5_vl", wrapped, marks=REST),
    ),
)
def test_text_is_one_graph_still(name: str, compiled: Callable[[Any], Any]) -> None:
    assert breaks_of_plain(name, "text only") == 0
    assert check(name, "text only", compiled) == 0


def with_the_tower_in_eager(name: str) -> Any:
    """Most of the time went into tracing it; PRe has no hook there."""
    model = make_model(name)
    model.model.get_image_features = torch.compiler.disable(model.model.get_image_features)
    return model


@pytest.mark.parametrize("name", ("llava", pytest.param("qwen2_5_vl", marks=REST)))
def test_images_break_the_graph_no_more_often(name: str) -> None:
    """transformers' own code breaks it, where it counts the features and puts them in place."""
    make = with_the_tower_in_eager
    breaks = breaks_of_plain(name, "images", make)
    assert check(name, "images", partial(wrapped, backend="eager"), make) == breaks > 0


@pytest.mark.parametrize("name", ("llava", pytest.param("qwen2_5_vl", marks=REST)))
def test_layers_compiled_one_by_one(name: str) -> None:
    assert check(name, "several images", layers) == 0


@pytest.mark.parametrize("setting", ("token_fraction", "global"))
def test_settings(setting: str) -> None:
    assert check("llava", "some text only", layers, **SETTINGS[setting]) == 0


@pytest.mark.parametrize("setting", ("two layers", pytest.param("value", marks=REST)))
def test_settings_break_no_graph(setting: str) -> None:
    assert check("llava", "text only", wrapped, **SETTINGS[setting]) == 0


@pytest.mark.parametrize(
    "setting",
    (
        {"level": "global"},  # traced forward, and backward in eager code
        pytest.param({"token_fraction": 0.5}, marks=REST),
        pytest.param({"anchor": "pre_projector"}, marks=REST),
    ),
)
def test_a_setting_that_breaks_the_graph(setting: dict[str, Any]) -> None:
    assert check("llava", "text only", whole, **setting) > 0


@pytest.mark.parametrize("denominator", (torch.zeros(()), pytest.param(0, marks=REST)))
def test_a_denominator_of_a_step_without_images(denominator: Any) -> None:
    """Its count of visual tokens is 0, as a number or a tensor; so is the term, with gradients."""
    figures, ours = [], []
    for compiled in (False, True):
        model = make_model("llava")
        batch = make_batch("llava", model, "text only").inputs
        pre = apply_pre(model)
        pre.denominator = denominator
        _, step = train(model, whole(model) if compiled else model, batch)
        figures.append(pre.metrics())
        ours.append(step)
        assert all(p.grad is not None and not p.grad.any() for p in pre.heads[2].parameters())
    compare(*ours)
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and figures[0]["pre_loss"] == 0


def test_batches_of_other_sizes() -> None:
    """Each has its own figures."""
    model = make_model("llava")
    pre = apply_pre(model)
    plain = copy.deepcopy(model)
    layers(model)
    for scene in ("images", "some text only"):
        batch = make_batch("llava", model, scene).inputs
        _, ours = train(model, model, batch)
        _, expected = train(plain, plain, batch)
        compare(ours, expected)
        assert pre.metrics() == pytest.approx(plain._prereg.metrics(), rel=1e-5)


def test_a_checkpointed_layer_without_its_hooks_raises() -> None:
    """torch.compile drops a hook that keeps something, silently; PRe must not train without.

    From transformers 5.24 on hooks are outside of the checkpoint, and stay.
    """
    model = with_the_tower_in_eager("llava")
    batch = make_batch("llava", model, "images").inputs
    apply_pre(model)
    model.gradient_checkpointing_enable(NON_REENTRANT)
    if not HOOKS_RUN_AGAIN:
        _, expected = train(model, model, batch)
        _, ours = train(model, whole(model), batch)
        compare(ours, expected)
        return
    with pytest.raises(RuntimeError, match=r"expected the layers \[2\] to run, got \[\]"):
        whole(model)(**batch)


def test_hooks_that_came_after_compilation_raise() -> None:
    """torch.compile does not look for new ones; PRe attached to a compiled model would be none."""
    model = with_the_tower_in_eager("llava")
    batch = make_batch("llava", model, "images").inputs
    model(**batch)
    call = whole(model)
    call(**batch)
    apply_pre(model)
    with pytest.raises(RuntimeError, match="attach PRe before"):
        call(**batch)


def check_compiled_layers(checkpoint: Callable[[Any], None], number: int | None = None) -> None:
    """Steps of two models, whose layers (None: all) are compiled one by one, against eager."""
    counters.clear()
    for _ in range(2):  # a graph of the first model's must not run for the second
        model = make_model("llava")
        batch = make_batch("llava", model).inputs | {"use_cache": False}
        pre = apply_pre(model)
        _, expected = train(model, model, batch)
        for i, layer in enumerate(model.get_decoder().layers, 1):
            if number is None or (i in pre.heads) == (number in pre.heads):
                layer.compile(backend="aot_eager")
        checkpoint(model)
        for _ in range(2):
            _, ours = train(model, model, batch)
            named = {name.replace(_CHECKPOINT_PREFIX, ""): x for name, x in ours.items()}
            compare(named, expected)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("number", (None, 1, 2), ids=("all", "others", "own"))
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing_with_layers_compiled_one_by_one(
    use_reentrant: bool, number: int | None
) -> None:
    """The way out that the error names: PRe's own layer too, whose graph ends before the tap."""

    def checkpoint(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    check_compiled_layers(checkpoint, number)


def test_a_reentrant_checkpoint_of_somebody_else_around_compiled_layers() -> None:
    """The layer does not say that it is checkpointed, and runs without grad, then with."""

    def checkpoint(model: Any) -> None:
        layers = model.get_decoder().layers
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer, CheckpointImpl.REENTRANT)

    check_compiled_layers(checkpoint)


@pytest.mark.filterwarnings("ignore:PRe. .* positions of the batch")
def test_next_visual_mask() -> None:
    """A step with a mask, and one by ids."""
    steps: list[list[dict[str, Tensor]]] = []
    for compiled in (False, True):
        model = make_model("llava")
        batch = make_batch("llava", model, "text only").inputs
        pre, ours = apply_pre(model), []
        call = whole(model) if compiled else model
        mask = batch["input_ids"] % 3 == 0
        tokens = int((mask & batch["attention_mask"].bool()).sum())
        for pre.next_visual_mask, count in ((mask, tokens), (None, 0)):
            ours.append(train(model, call, batch)[1])
            assert pre.next_visual_mask is None and pre.metrics()["visual_tokens"] == count
        steps.append(ours)
    for expected, compiled_step in zip(*steps, strict=True):
        compare(compiled_step, expected)
