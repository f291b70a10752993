# SPDX-License-Identifier: Apache-2.0
"""A loss without the term would train no head: an error, and for nobody else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from prereg_kernels import apply_pre
from prereg_kernels.trainers import PReTrainer
from tests.attached import NON_REENTRANT
from tests.tiny import make_batch, tiny_llava
from tests.trainers.rows import make_trainer

MESSAGE = "PRe: the backward pass came from a loss without the term"


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in batch.items() if name != "labels"}


def loss_of(output: Any) -> Tensor:
    """As a trainer computes its own, from the model's logits."""
    return output.logits.log_softmax(dim=-1)[..., 5].mean().neg()


def messages_of(steps: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps()
    return [str(w.message) for w in caught if str(w.message).startswith("PRe")]


def make_model(checkpointing: bool = False, **settings: Any) -> Any:
    model = tiny_llava()
    apply_pre(model, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    return model


@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_loss_beside_that_of_the_model(checkpointing: bool) -> None:
    """The model computed one, which somebody dropped: raises in the first backward pass."""
    model, batch = make_model(checkpointing, layers=(1, 3)), make_batch()
    with pytest.raises(RuntimeError, match=f"{MESSAGE}.*PReTrainerMixin"):
        loss_of(model(**batch)).backward()


@pytest.mark.parametrize("settings", ({"level": "global"}, {"value_in_forward": True}, {}))
def test_a_loss_beside_that_of_the_model_whose_graph_is_kept(settings: dict[str, Any]) -> None:
    """The term might still come: raises in the second step, and goes on if asked again."""
    model, batch = make_model(layers=(1, 3), **settings), make_batch()
    loss_of(model(**batch)).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        model(**batch)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.pre_heads.parameters())


def test_who_asks_for_the_loss_alone_is_told_once() -> None:
    model, batch = make_model(gradient="loss"), make_batch()
    loss_of(model(**batch)).backward()
    with pytest.warns(UserWarning, match=MESSAGE):
        loss = loss_of(model(**batch))
    loss.backward()
    assert not messages_of(lambda: loss_of(model(**batch)).backward())
    assert all(p.grad is None for p in model.pre_heads.parameters())


def test_a_trainer_that_computes_its_own_loss(tmp_path: Path) -> None:
    """transformers' cannot tell the micro-batch's share of the step; PReTrainer counts."""

    def make_smoothing(cls: Any) -> Any:
        return make_trainer(
            make_model(), tmp_path, cls=cls, label_smoothing_factor=0.1,
            per_device_train_batch_size=2,
        )  # fmt: skip

    with pytest.raises(ValueError, match="labels: the call has num_items_in_batch without them"):
        make_smoothing(Trainer).train()
    assert not messages_of(make_smoothing(PReTrainer).train)


def labelled(model: Any) -> None:
    model(**make_batch()).loss.backward()


def added(model: Any) -> None:
    (loss_of(model(**without_labels(make_batch()))) + model._prereg.loss).backward()


def added_apart(model: Any) -> None:
    """A loss of the model's outputs, and later the one that it returned."""
    output = model(**make_batch())
    loss_of(output).backward(retain_graph=True)
    output.loss.backward()


def left_to_the_user(model: Any) -> None:
    pre = model._prereg
    pre.add_to_loss = False
    loss = model(**make_batch()).loss
    loss.backward(retain_graph=True)
    pre.loss.backward()
    pre.add_to_loss = True


def several_forwards(model: Any) -> None:
    losses = [model(**make_batch(seed=seed)).loss for seed in range(3)]
    torch.stack(losses).sum().backward()


def no_backward(model: Any) -> None:
    model(**without_labels(make_batch()))


def evaluated(model: Any) -> None:
    model.eval()
    loss_of(model(**without_labels(make_batch()))).backward()
    model.train()


def generated(model: Any) -> None:
    batch = without_labels(make_batch())
    model.generate(**batch, max_new_tokens=2, do_sample=False, eos_token_id=-1)
    assert model.training


def checkpointed(model: Any) -> None:
    batch = make_batch()
    checkpoint(lambda: model(**batch).loss, use_reentrant=False).backward()


def text_only(model: Any) -> None:
    model(**make_batch((0, 0))).loss.backward()


def head_alone(model: Any) -> None:
    model(**without_labels(make_batch()))
    model._prereg.loss.backward()


USES = (
    labelled, added, added_apart, left_to_the_user, several_forwards, no_backward, evaluated,
    generated, checkpointed, text_only, head_alone,
)  # fmt: skip


@pytest.mark.parametrize("settings", ({}, {"level": "global"}), ids=("patch", "global"))
@pytest.mark.parametrize("use", USES)
def test_no_false_alarm(use: Callable[[Any], None], settings: dict[str, Any]) -> None:
    model = make_model(**settings)

    def steps() -> None:
        for step in (use, use, labelled):
            step(model)

    assert not messages_of(steps)
