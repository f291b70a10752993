# SPDX-License-Identifier: Apache-2.0
"""The heads' own learning rate and decay, and their part of the gradient's norm."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from prereg_kernels import PReConfig, apply_pre
from prereg_kernels.trainers.optimizers import HeadNorm
from tests.releases import HERE
from tests.tiny import gradients, tiny_llava
from tests.trainers.rows import Gradients, make_trainer

RATES = {"head_learning_rate": 0.3, "head_weight_decay": 0.2}


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def one_step(out: Path, settings: dict[str, Any], **arguments: Any) -> Any:
    """(before, gradients, after) of a step of SGD at 0.1, with decay 0.05."""
    model, keeper = tiny_llava(), Gradients()
    apply_pre(model, weight=3.0, **settings)
    before = weights(model)
    trainer = make_trainer(
        model, out, optim="sgd", learning_rate=0.1, weight_decay=0.05, max_steps=1,
        callbacks=[keeper], **arguments,
    )  # fmt: skip
    trainer.train()
    return before, keeper.steps[0], weights(model), trainer


@pytest.mark.parametrize("names", ((), ("head_learning_rate",), ("head_weight_decay",), (*RATES,)))
def test_a_step_moves_each_by_its_own(tmp_path: Path, names: tuple[str, ...]) -> None:
    """By rate * (gradient + decay * weight), with no decay of biases and norms."""
    settings = {name: RATES[name] for name in names}
    before, grads, after, _ = one_step(tmp_path, settings)
    for name, x in before.items():
        is_head = "pre_heads" in name
        rate = settings.get("head_learning_rate", 0.1) if is_head else 0.1
        decay = settings.get("head_weight_decay", 0.05) if is_head else 0.05
        if "bias" in name or "norm" in name or not grads[name].any():  # the tower's last layer
            decay = 0.0
        torch.testing.assert_close(after[name], x - rate * (grads[name] + decay * x))
    assert all(
        grads[name].norm() > 1e-3 and not torch.equal(after[name], x)
        for name, x in before.items()
        if "pre_heads" in name
    )


def test_groups_for_a_loop_are_those_of_trainer(tmp_path: Path) -> None:
    """Of the model; the heads have two of their own, and what is frozen is in none."""
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    pre = apply_pre(model, **RATES)
    groups = pre.parameter_groups(learning_rate=1e-4, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    ours = [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in groups]
    trainer = make_trainer(model, tmp_path, Trainer, weight_decay=0.1, learning_rate=1e-4)
    theirs = [
        ({n for p in group["params"] if "pre_heads" not in (n := names[id(p)])}, weight_decay)
        for group in trainer.create_optimizer().param_groups
        for weight_decay in [group["weight_decay"]]
    ]
    assert ours[:2] == theirs
    heads = {"pre_heads.2.weight_0", "pre_heads.2.weight_1"}
    assert ours[2:] == [(heads, 0.2), ({name.replace("weight", "bias") for name in heads}, 0.0)]
    assert [group["lr"] for group in groups] == [1e-4, 1e-4, 0.3, 0.3]
    assert not any("vision_tower" in name for found, _ in ours for name in found)


def test_a_schedule_scales_both(tmp_path: Path) -> None:
    model = tiny_llava()
    apply_pre(model, **RATES)
    trainer = make_trainer(
        model, tmp_path, learning_rate=0.1, lr_scheduler_type="linear", max_steps=4
    )
    trainer.train()
    rates = {group["initial_lr"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.1: 0.0, 0.3: 0.0}
    for group in trainer.optimizer.param_groups:  # as a scheduler that keeps no first rate
        del group["initial_lr"]
        group["lr"] = 0.05
    trainer.train()  # the optimizer is the trainer's still


def test_an_optimizer_that_is_given(tmp_path: Path) -> None:
    """It has them, or that is said."""
    model = tiny_llava()
    pre = apply_pre(model, **RATES)
    given = torch.optim.SGD(pre.parameter_groups(0.1))
    warmup = torch.optim.lr_scheduler.LambdaLR(given, lambda step: 0.0)
    make_trainer(model, tmp_path, optimizers=(given, warmup), max_steps=1).train()
    assert len(given.param_groups) == 4
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(model, tmp_path, optimizers=(other, None))
    with pytest.raises(ValueError, match=r"groups with head_learning_rate=0\.3 and head_weight_de"):
        trainer.train()


@pytest.mark.parametrize("limit", (0.0, 1e-2, 1e4))
def test_the_norm_of_the_heads_gradient(tmp_path: Path, limit: float) -> None:
    """Before clipping, as that of all; its square is a part of the other's."""
    model, whole = tiny_llava(), tiny_llava()
    for each in (model, whole):
        apply_pre(each, weight=3.0)
    trainer = make_trainer(model, tmp_path, max_grad_norm=limit, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    other = make_trainer(whole, tmp_path)
    other.compute_loss(whole, other.data_collator(other.train_dataset)).backward()
    found = gradients(whole)
    heads = torch.stack([x.norm() for name, x in found.items() if "pre_heads" in name]).norm()
    total = torch.stack([x.norm() for x in found.values()]).norm()
    if limit or HERE >= (5, 0):  # 4.57 logs none where it does not clip
        assert log["grad_norm"] == pytest.approx(total.item(), rel=1e-4)
    assert log["pre_grad_norm"] == pytest.approx(heads.item(), rel=1e-4)
    assert 0.01 < log["pre_grad_norm"] / total.item() < 1


@pytest.mark.parametrize(
    ("limit", "logs", "expected"),
    ((0.0, {}, 3.0), (1.0, {"grad_norm": 4.0}, 12.0), (1.0, {}, math.nan)),
)
def test_the_norm_by_what_is_logged(limit: float, logs: dict[str, float], expected: float) -> None:
    """transformers 4.57 logs no norm where nothing is clipped; what is clipped needs it."""
    heads = HeadNorm(SimpleNamespace(args=SimpleNamespace(max_grad_norm=limit)))
    heads._norm = torch.tensor(3.0)
    assert heads.take(logs).item() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert heads.take(logs).isnan().all()  # once


@pytest.mark.parametrize("value", (-0.1, float("inf"), True, "1e-3"))
@pytest.mark.parametrize("name", RATES)
def test_rates_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a non-negative finite number"):
        PReConfig(**{name: value})


def test_an_optimizer_of_matrices_alone(tmp_path: Path) -> None:
    """As Muon's is in axolotl, which leaves out what has one dimension."""
    model = tiny_llava()
    apply_pre(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    trainer = make_trainer(model, tmp_path, optimizers=(torch.optim.SGD(matrices, lr=0.1), None))
    with pytest.raises(ValueError, match=r"SGD lacks pre_heads\.2\.bias_0, .*leaves out biases"):
        trainer.train()
