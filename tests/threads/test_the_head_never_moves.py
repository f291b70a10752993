# SPDX-License-Identifier: Apache-2.0
"""L_PRe falls nicely in my log, and the head's weights are bitwise those of the first step.

The heads were in no parameter group: the optimizer was made before apply_pre and handed over, or
its groups were picked by name. L_PRe falls all the same, as the LLM adapts to a random head.

PReTrainer refuses to start, and names the heads. It starts where the optimizer has them, in
whatever group, and where it has no parameters of the model by which this could be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.trainers import PReTrainer
from tests.tiny import tiny_llava
from tests.trainers.rows import make_rows, make_trainer

MISSING = (
    r"optimizer: expected PRe's heads in its param_groups, got none with "
    r"pre_heads\.2\.weight_0, pre_heads\.2\.bias_0, pre_heads\.2\.weight_1, pre_heads\.2\.bias_1; "
    r".*after apply_pre.*a group for 'pre_heads'"
)


class ByName(PReTrainer):
    """Groups by a prefix of the name, as for a learning rate of the tower and of the projector."""

    prefixes: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector", "lm_head")

    def create_optimizer(self, model: Any = None) -> Any:
        named = list(self.model.named_parameters())
        groups = [[p for n, p in named if n.startswith(prefix)] for prefix in self.prefixes]
        self.optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.1)
        return self.optimizer


class WithHeads(ByName):
    prefixes = (*ByName.prefixes, "pre_heads")


class Late(TrainerCallback):
    """Puts PRe on the model when training begins, anew."""

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        remove_pre(model)
        apply_pre(model)


def made_before(out: Path) -> Any:
    model = tiny_llava()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_pre(model)
    return make_trainer(model, out, optimizers=(optimizer, None))


def grouped_by_name(out: Path) -> Any:
    model = tiny_llava()
    apply_pre(model)
    return make_trainer(model, out, cls=ByName)


def applied_late(out: Path) -> Any:
    model = tiny_llava()
    apply_pre(model)
    return make_trainer(model, out, callbacks=[Late()])


def with_lora(out: Path) -> Any:
    """The adapter's optimizer, from before."""
    model = tiny_llava()
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    apply_pre(model)
    return make_trainer(lora, out, optimizers=(optimizer, None))


@pytest.mark.parametrize("make", (made_before, grouped_by_name, applied_late, with_lora))
def test_it_is_said_before_the_first_step(tmp_path: Path, make: Callable[..., Any]) -> None:
    trainer = make(tmp_path)
    with pytest.raises(ValueError, match=MISSING):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_deepspeed_is_given(tmp_path: Path) -> None:
    """Its engine puts tensors of its own in the optimizer; before that, the model's are there."""
    trainer = grouped_by_name(tmp_path)
    optimizer = trainer.create_optimizer()
    trainer.is_deepspeed_enabled = True
    assert trainer.optimizer is optimizer
    with pytest.raises(ValueError, match=MISSING):
        PReTrainer.create_optimizer(trainer)


class FromTheModel(torch.optim.SGD):
    """Groups of tensors of its own, as a layer-wise or partitioned optimizer has."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        super().__init__([torch.zeros(1, requires_grad=True)], lr=0.1)

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    p -= 0.1 * p.grad


def own_tensors(out: Path) -> Any:
    model = tiny_llava()
    apply_pre(model)
    return make_trainer(model, out, optimizers=(FromTheModel(model), None))


def group_of_its_own(out: Path) -> Any:
    model = tiny_llava()
    apply_pre(model)
    return make_trainer(model, out, cls=WithHeads)


def frozen_bias(out: Path) -> Any:
    """What is frozen need not be in it."""
    model = tiny_llava()
    apply_pre(model).heads[2].bias_0.requires_grad_(False)
    return make_trainer(model, out, max_grad_norm=1.0)


@pytest.mark.parametrize("make", (own_tensors, group_of_its_own, frozen_bias))
def test_no_false_alarm(tmp_path: Path, make: Callable[..., Any]) -> None:
    trainer = make(tmp_path)
    head = trainer.pre.heads[2]
    before = [p.detach().clone() for p in head.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in head.parameters() if p.requires_grad]
    assert not any(map(torch.equal, before, after))
    assert trainer.state.global_step == len(make_rows()) // 8
