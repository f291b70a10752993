# SPDX-License-Identifier: Apache-2.0
"""The check of the first steps beside torch.compile: where it looks, and that graphs stay alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from prereg_kernels import apply_pre
from tests.attach.misplaced import ERROR, FAMILY, right_batch, wrong_batch
from tests.attached import compare
from tests.tiny import gradients, tiny_llava


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


TEXT = {"images": (0, 0)}  # traced in one graph; the check compares it as any other


def attach() -> Any:
    """Of two layers, as tracing takes most of the time."""
    model = tiny_llava()
    model.config.text_config.num_hidden_layers = 2
    del model.get_decoder().layers[2:]
    apply_pre(model, family=FAMILY, layers=1)
    return model


def step(model: Any, call: Any, batch: Any) -> tuple[int, int]:
    """The graphs and the graph breaks so far."""
    model.zero_grad()
    call(**batch).loss.backward()
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def after_a_step(model: Any) -> Any:
    model(**right_batch(**TEXT))
    return whole(model)


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def layers(model: Any) -> Any:
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager", fullgraph=True)
    return model


def decoder(model: Any) -> Any:
    model.get_decoder().compile(backend="eager", fullgraph=True)
    return model


def around_the_decoder(model: Any) -> Any:
    """With what calls the embedding module: a hook on it would be traced."""
    model.model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", (whole, after_a_step, layers, decoder, around_the_decoder))
def test_graphs_stay_whole_and_are_not_made_again(compiled: Callable[[Any], Any]) -> None:
    """In the first step, in later ones, and after `PRe.check`, which compiles nothing."""
    model, batch = attach(), right_batch(**TEXT)
    call = compiled(model)
    steps = [step(model, call, batch) for _ in range(2)]
    model._prereg.check(batch)
    steps.append(step(model, call, batch))
    (graphs, breaks), *later = steps
    assert graphs > 0 and breaks == 0 and later == [steps[0]] * 2


@pytest.mark.parametrize("compiled", (after_a_step, layers, decoder))
def test_an_error_where_something_is_wrong(compiled: Callable[[Any], Any]) -> None:
    """In the eager warm-up; before graphs of layers; at the end of a pass through the decoder's."""
    model = attach()
    with pytest.raises(ValueError, match=ERROR):
        if compiled is after_a_step:
            model(**wrong_batch())
        else:
            compiled(model)(**wrong_batch())


def test_gradients_after_the_look_at_a_compiled_decoder() -> None:
    model = attach()
    model(**right_batch()).loss.backward()
    expected = gradients(model)
    model = decoder(attach())
    for _ in range(2):
        model.zero_grad()
        model(**right_batch()).loss.backward()
        compare(gradients(model), expected)


@pytest.mark.parametrize("compiled", (in_place, around_the_decoder))
def test_check_sees_what_a_graph_hides(compiled: Callable[[Any], Any]) -> None:
    """There no step looks."""
    model = attach()
    call = compiled(model)
    call(**wrong_batch(**TEXT)).loss.backward()
    with pytest.raises(ValueError, match=ERROR):
        model._prereg.check(wrong_batch(**TEXT))
    model._prereg.check(right_batch())
