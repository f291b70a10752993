# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing around the tap: what is held for backward, and the gradients.

What is computed again is counted in tests/benchmarks/step/test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from prereg_kernels import apply_pre
from tests.attach.families.batches import make_batch as family_batch
from tests.attach.families.models import LAYERS, make_model
from tests.attached import HOOKS_RUN_AGAIN, NON_REENTRANT, compare, seen
from tests.tiny import gradients, make_batch, tiny_llava


def held_bytes(model: Any, call: Callable[[], Tensor]) -> int:
    """What the graph of `call` holds for backward, beside the model's parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = call()
    assert loss.requires_grad
    return sum(x.nbytes() for address, x in storages.items() if address not in known)


def inside(call: Callable[[], Tensor]) -> Tensor:
    """In a checkpoint of the caller's own."""
    return checkpoint(call, use_reentrant=False)


def alone(call: Callable[[], Tensor]) -> Tensor:
    return call()


def states_bytes(name: str) -> int:
    """Of a layer's output in bfloat16."""
    model = make_model(name)
    width = model.get_input_embeddings().weight.shape[1]
    return 2 * width * family_batch(name, model, "images").inputs["input_ids"].numel()


@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl", "qwen3_vl"))
@pytest.mark.parametrize("around", (alone, inside))
def test_nothing_more_is_held(name: str, around: Callable[..., Tensor]) -> None:
    """At any layer; in bfloat16, where the last norm holds a copy of its input.

    From transformers 5.24 on the tap is outside of its layer's checkpoint: what it reads is held,
    unless it is the next layer's input.
    """

    def held(*layers: int) -> int:
        model = make_model(name)
        batch = family_batch(name, model, "images").inputs
        model.bfloat16().gradient_checkpointing_enable(NON_REENTRANT)
        if layers:
            apply_pre(model, layers=layers)
        return held_bytes(model, lambda: around(lambda: model(**batch).loss))

    without = held()
    assert (without > 0) == (around is alone)
    expected = [without] * LAYERS
    if around is alone and not HOOKS_RUN_AGAIN:
        for layer in (1, 2, LAYERS) if name == "qwen3_vl" else (LAYERS,):
            expected[layer - 1] += states_bytes(name)
    assert [held(layer) for layer in range(1, LAYERS + 1)] == expected


def test_nothing_is_held_in_a_checkpoint_of_several_layers() -> None:
    """One that transformers does not know of."""
    model, batch = tiny_llava(), make_batch()
    apply_pre(model)
    assert held_bytes(model, lambda: inside(lambda: model(**batch).loss)) == 0


@pytest.mark.parametrize("frozen", (False, True))
def test_nothing_is_held_that_is_offloaded(frozen: bool) -> None:
    """By hooks around the checkpoints; `frozen`: around layers that are not checkpointed."""
    model, batch = tiny_llava(), make_batch()
    apply_pre(model)
    model.gradient_checkpointing_enable(NON_REENTRANT)
    model.get_decoder().train(not frozen)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x), seen(model) as states:
        loss = model(**batch).loss
        outputs = [
            StorageWeakRef(states[layer].untyped_storage()) for layer in range(1, LAYERS + 1)
        ]
        assert not any(x.expired() for x in outputs)
        states.clear()
    assert all(x.expired() for x in outputs)
    loss.backward()


@pytest.mark.parametrize("early_stop", (True, False))
@pytest.mark.parametrize("setting", ("alone", "inside", "evaluating"))
def test_gradients(setting: str, early_stop: bool) -> None:
    """Of two backward passes; of a model in a checkpoint, and of one that trains no more."""
    model, batch = tiny_llava(), make_batch((1, 2))
    apply_pre(model, layers=(1, 3, 4))
    model(**batch).loss.backward()
    expected = {name: 2 * x for name, x in gradients(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable(NON_REENTRANT)
    with set_checkpoint_early_stop(early_stop):
        call = inside if setting == "inside" else alone
        loss = call(lambda: model(**batch).loss)
        model.train(setting != "evaluating")
        loss.backward(retain_graph=True)
        loss.backward()
    compare(gradients(model), expected)
