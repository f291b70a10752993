# SPDX-License-Identifier: Apache-2.0
"""I evaluate, or generate, in a second thread while the model trains: most steps lose the term.

The state of a forward pass was the model's. It is the call's now, and a thread sees its own calls.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre
from tests.attached import NON_REENTRANT
from tests.tiny import IMAGE_TOKEN, WIDTH, gradients, make_batch, tiny_llava


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("settings", ({}, {"value_in_eval": True, "level": "global"}))
def test_every_step_has_its_term(settings: dict[str, Any], checkpointing: bool) -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    apply_pre(model, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    model(**batch).loss.backward()
    expected = gradients(model)
    other, done, errors = make_batch((2, 0, 1), seed=7), threading.Event(), []
    inside, go_on = threading.Event(), threading.Event()

    def evaluate() -> None:
        try:
            while not done.is_set():
                with torch.no_grad():
                    model(**other)
                inside.set()
                go_on.wait(0.01)
        except Exception as error:
            errors.append(error)

    def wait_for_the_other(*args: Any) -> None:
        """In the middle of a training pass, until the other thread has made one of its own."""
        if threading.current_thread() is not thread:
            inside.clear()
            go_on.set()
            assert errors or inside.wait(5)
            go_on.clear()

    thread = threading.Thread(target=evaluate, daemon=True)
    layers = model.model.language_model.layers
    handles = [layers[i].register_forward_pre_hook(wait_for_the_other) for i in (1, 2)]
    thread.start()
    try:
        for _ in range(5):
            model.zero_grad()
            model(**batch).loss.backward()
            ours = gradients(model)
            assert all(torch.equal(ours[name], x) for name, x in expected.items())
    finally:
        done.set()
        thread.join(20)
    for handle in handles:
        handle.remove()
    assert not errors


def test_an_anchor_function_may_call_the_model() -> None:
    """A call within a call is one of its own."""
    batch = make_batch((1, 2))
    rows = states_of(tiny_llava(), batch)
    expected = train(tiny_llava(), batch, lambda model, inputs: rows)
    ours = train(tiny_llava(), batch, states_of)
    assert all(torch.equal(ours[name], x) for name, x in expected.items())


def states_of(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        states = model.model(**{k: v for k, v in inputs.items() if k != "labels"})
    return states.last_hidden_state[inputs["input_ids"] == IMAGE_TOKEN]


def train(model: Any, batch: Any, anchor: Any) -> dict[str, Tensor]:
    apply_pre(model, anchor=partial(anchor, model), anchor_features=WIDTH)
    model(**batch).loss.backward()
    return gradients(model)
