# SPDX-License-Identifier: Apache-2.0
"""L_PRe falls in the log, and the heads are what they were at the start.

No optimizer has them: it was made before `apply_pre`, or its parameter groups go by name. The LLM
adapts to the random heads, so the log looks healthy. A loop hears of it once, by the third step.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from prereg_kernels import apply_pre, remove_pre
from tests.tiny import make_batch, tiny_llava

MESSAGE = "PRe: three steps of the model's optimizer left out pre.heads"


def by_prefix(model: nn.Module) -> list[dict[str, Any]]:
    """As trainers do that give the tower and the projector learning rates of their own."""
    rates = {"vision_tower": 1e-3, "multi_modal_projector": 1e-2, "language_model": 1e-3}
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name.startswith(f"model.{part}")], "lr": rate}
        for part, rate in rates.items()
    ]


def train(
    parameters: Callable[[nn.Module], Iterable[Any]],
    optimizer: Any = torch.optim.AdamW,
    before: bool = False,
    accumulation: int = 1,
    steps: int = 5,
    prepare: Callable[[nn.Module], Any] = lambda model: None,
    **options: Any,
) -> tuple[list[int], bool]:
    """(the steps in which PRe warned, whether the heads moved)"""
    model, batch = tiny_llava(), make_batch()
    prepare(model)
    if not before:
        apply_pre(model)
    optimizer = optimizer(list(parameters(model)), lr=1e-2, **options)
    if before:
        apply_pre(model)
    start = model.pre_heads["2"].weight_0.clone()
    warned = []
    for step in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(accumulation):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        warned += [step for w in caught if str(w.message).startswith(MESSAGE)]
    return warned, not torch.equal(model.pre_heads["2"].weight_0, start)


@pytest.mark.parametrize("accumulation", (1, 3))
@pytest.mark.parametrize("options", ({}, {"foreach": True}, {"fused": True}), ids=str)
def test_an_optimizer_made_before(options: dict[str, Any], accumulation: int) -> None:
    warned, moved = train(nn.Module.parameters, before=True, accumulation=accumulation, **options)
    assert warned == [3] and not moved


@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.Adam, torch.optim.Adafactor))
def test_groups_by_name(optimizer: Any) -> None:
    assert train(by_prefix, optimizer) == ([3], False)


def freeze_the_model(model: nn.Module) -> None:
    model.requires_grad_(False)


@pytest.mark.parametrize("options", ({}, {"foreach": True}, {"fused": True}), ids=str)
@pytest.mark.parametrize("accumulation", (1, 3))
def test_no_false_alarm(options: dict[str, Any], accumulation: int) -> None:
    assert train(nn.Module.parameters, accumulation=accumulation, **options) == ([], True)


def test_heads_alone_are_no_false_alarm() -> None:
    assert train(nn.Module.parameters, prepare=freeze_the_model) == ([], True)


def test_an_optimizer_for_each() -> None:
    """One has the heads and steps less often, from the second step on."""
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    mine = torch.optim.SGD(pre.heads[2].parameters(), lr=1e-2)
    others = torch.optim.SGD([p for n, p in model.named_parameters() if "pre_heads" not in n], 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            model(**batch).loss.backward()
            others.step()
            if step % 2:
                mine.step()
            model.zero_grad()


def test_a_copy_is_watched_and_a_dropped_model_is_not() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    gc.collect()  # models of other tests
    before = len(hooks)
    model = tiny_llava()
    apply_pre(model)
    clone = copy.deepcopy(model)
    assert len(hooks) == before + 2
    remove_pre(model)
    del clone
    gc.collect()
    assert len(hooks) == before
