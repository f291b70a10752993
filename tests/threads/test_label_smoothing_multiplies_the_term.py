# SPDX-License-Identifier: Apache-2.0
"""With label smoothing and four micro-batches, PRe's gradient was four times what it should be.

transformers' Trainer takes the labels out of a call to smooth them, and divides its loss by the
micro-batches. Models whose `accepts_loss_kwargs` is False, as Qwen-VL's and Gemma 3's, get no count
of labels either. So PRe does not know that loss, and backward adds the gradient of each call's own
mean. PRe says so where a step has several such calls and nobody has said how they are scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from prereg_kernels import apply_pre
from prereg_kernels.attach.handle import PRe
from prereg_kernels.trainers import PReTrainer
from tests.attach.test_unused_term import loss_of, messages_of, without_labels
from tests.attached import NON_REENTRANT
from tests.helpers import relative_error
from tests.tiny import make_batch, tiny_llava
from tests.trainers.rows import WEIGHT, eager_gradients, make_rows, step_gradients

MESSAGE = "PRe: a step had several calls whose loss PRe does not know"
ROWS = make_rows((1,) * 8, (5,) * 8)  # every micro-batch counts alike


def smoothed(
    out: Path, cls: type[Trainer], scale: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The heads' gradients of a step of four micro-batches, and the definition's."""
    model = tiny_llava()
    model.accepts_loss_kwargs = False
    pre = apply_pre(model, weight=WEIGHT)
    if scale is not None:
        pre.loss_scale = scale
    (step,) = step_gradients(model, out, 2, 4, cls=cls, rows=ROWS, label_smoothing_factor=0.1)
    names = [name for name in step if "pre_heads" in name]
    expected = eager_gradients(pre.heads, ROWS)
    return {name: step[name] for name in names}, {name: expected[name] for name in names}


def test_trainer_alone(tmp_path: Path) -> None:
    assert [m[: len(MESSAGE)] for m in messages_of(lambda: smoothed(tmp_path, Trainer))] == [
        MESSAGE
    ]


@pytest.mark.parametrize("cls, scale", ((Trainer, 0.25), (PReTrainer, None)))
def test_what_the_message_names(tmp_path: Path, cls: type[Trainer], scale: float | None) -> None:
    ours, expected = smoothed(tmp_path, cls, scale)  # a warning would be an error
    assert ours.keys() == expected.keys() and ours
    for name, x in expected.items():
        assert relative_error(ours[name], x) < 2e-5


def unlabelled(model: Any) -> Tensor:
    return loss_of(model(**without_labels(make_batch())))


def labelled(model: Any) -> Tensor:
    loss: Tensor = model(**make_batch()).loss
    return loss


def with_a_count(model: Any) -> Tensor:
    """As Trainer calls a model that takes the number of the step's labels."""
    loss: Tensor = model(**make_batch(), num_items_in_batch=20).loss
    return loss


def with_the_term(model: Any) -> Tensor:
    return unlabelled(model) + model._prereg.loss


def step_of(
    losses: Callable[[Any], Tensor],
    calls: int,
    prepare: Callable[[Any, PRe], Any] | None = None,
    **settings: Any,
) -> Callable[[], None]:
    """Two steps of a loop, each with so many calls."""
    model = tiny_llava()
    gradient = "tap" if losses in (labelled, with_a_count) else "auto"
    pre = apply_pre(model, gradient=gradient, **settings)
    if prepare is not None:
        prepare(model, pre)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def steps() -> None:
        for _ in range(2):
            for _ in range(calls):
                (losses(model) / calls).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


@pytest.mark.parametrize("settings", ({}, {"layers": (1, 3)}, {"level": "global"}))
@pytest.mark.parametrize("checkpointing", (None, NON_REENTRANT, {"use_reentrant": True}))
@pytest.mark.parametrize("losses", (unlabelled, labelled))
def test_a_loop(
    losses: Callable[[Any], Tensor], checkpointing: Any, settings: dict[str, Any]
) -> None:
    def prepare(model: Any, pre: PRe) -> None:
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)

    (message,) = messages_of(step_of(losses, 2, prepare, **settings))  # once
    assert message.startswith(MESSAGE)


def scaled(model: Any, pre: PRe) -> None:
    pre.loss_scale = 1.0


def counted(model: Any, pre: PRe) -> None:
    pre.denominator = 24.0


def looked_at(model: Any, pre: PRe) -> None:
    """Calls before training, which go through no backward pass."""
    for _ in range(3):
        model.train()(**without_labels(make_batch()))


@pytest.mark.parametrize(
    "losses, calls, prepare",
    (
        (unlabelled, 1, None),
        (unlabelled, 2, scaled),
        (unlabelled, 2, counted),
        (unlabelled, 1, looked_at),
        (with_the_term, 2, None),
        (with_a_count, 2, None),
        (labelled, 1, None),
    ),
)
def test_no_false_alarm(
    losses: Callable[[Any], Tensor], calls: int, prepare: Callable[[Any, PRe], Any] | None
) -> None:
    assert not messages_of(step_of(losses, calls, prepare))
