# SPDX-License-Identifier: Apache-2.0
"""The weight of L_PRe step by step, and the watched gradients of whole steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, get_scheduler

from prereg_kernels import PReConfig, apply_pre, eager_pre_loss, remove_pre
from prereg_kernels.trainers import PReCallback
from tests.attached import compare, seen
from tests.tiny import IMAGE_TOKEN, tiny_llava
from tests.trainers.rows import (
    Row,
    collate,
    eager_gradients,
    make_rows,
    make_trainer,
    step_gradients,
)

LM, PRE, COSINE = "lm_hidden_grad_norm", "pre_hidden_grad_norm", "hidden_grad_cosine"


@pytest.mark.parametrize("schedule", ("constant", "linear", "cosine"))
@pytest.mark.parametrize("warmup", (0, 7, 0.1))
def test_schedules_are_those_of_learning_rates(schedule: Any, warmup: float) -> None:
    steps = 41
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    warm = warmup if warmup >= 1 else 5  # a tenth of 41, rounded up
    name = "constant_with_warmup" if schedule == "constant" else schedule
    rates = get_scheduler(name, optimizer, warm if warmup else 0, steps)
    config = PReConfig(weight=0.3, weight_schedule=schedule, weight_warmup_steps=warmup)
    for step in range(steps):
        assert config.weight_at(step, steps) == pytest.approx(rates.get_last_lr()[0]), step
        optimizer.step()
        rates.step()


def test_each_step_has_its_weight(tmp_path: Path) -> None:
    """Four steps of two rows: 0, 3, 2 and 1; the logs say so; in the first there is no L_PRe."""
    settings: dict[str, Any] = {"weight_schedule": "linear", "weight_warmup_steps": 1}
    model = tiny_llava()
    pre = apply_pre(model, weight=3.0, **settings)
    steps = step_gradients(model, tmp_path, 2, 1)
    assert pre.weight == 3.0  # after the run
    remove_pre(model)
    rows = make_rows()
    for number, weight in enumerate((0.0, 3.0, 2.0, 1.0)):
        part = rows[2 * number : 2 * number + 2]
        if any(len(row["pixel_values"]) for row in part):
            compare(steps[number], eager_gradients(pre.heads, part, weight=weight))
    trainer = scheduled(tmp_path, weight=3.0, **settings)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["pre_weight"] for log in logs] == [0.0, 3.0, 2.0, 1.0]
    assert ["pre_loss" in log for log in logs] == [False, True, True, True]


def scheduled(out: Path, **settings: Any) -> Trainer:
    model = tiny_llava()
    apply_pre(model, **settings)
    trainer = make_trainer(model, out, per_device_train_batch_size=2)
    trainer.train()
    return trainer


def definition(heads: Mapping[int, Any], rows: list[Row], weight: float) -> tuple[Tensor, Tensor]:
    model, batch = tiny_llava(), collate(rows)
    mask = batch["input_ids"] == IMAGE_TOKEN
    with seen(model) as states:
        lm = model(**batch).loss
    [(layer, head)] = heads.items()
    term = weight * eager_pre_loss(
        states[layer][mask], states[0][mask], head.weights, head.biases,
        activation=head.activation,
    )  # fmt: skip
    parts = [torch.autograd.grad(x, states[layer], retain_graph=True)[0] for x in (lm, term)]
    return parts[0][mask], parts[1][mask]


@pytest.mark.parametrize("size, count", ((8, 1), (2, 4)))
@pytest.mark.parametrize("average_tokens", (False, True))
def test_a_watched_step(tmp_path: Path, size: int, count: int, average_tokens: bool) -> None:
    """However it is cut: the gradients of the whole step's objective, in the steps asked for."""
    model = tiny_llava()
    pre = apply_pre(model, weight=3.0, watch_steps=3)
    trainer = make_trainer(
        model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=count,
        learning_rate=0.0, num_train_epochs=4, average_tokens_across_devices=average_tokens,
    )  # fmt: skip
    trainer.train()
    assert not pre.watches_gradients
    remove_pre(model)
    g, p = definition(pre.heads, make_rows(), 3.0)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [COSINE in log for log in logs] == [True, False, True, False]
    for log in (logs[0], logs[2]):
        assert log[LM] == pytest.approx(g.norm().item(), rel=1e-4)
        assert log[PRE] == pytest.approx(p.norm().item(), rel=1e-4)
        cosine = (g * p).sum() / g.norm() / p.norm()
        assert log[COSINE] == pytest.approx(cosine.item(), rel=1e-3, abs=1e-5)
        assert 0 < log["pre_seconds"] < 1
    assert "pre_seconds" not in logs[1]


def test_a_ratio_is_led_to(tmp_path: Path) -> None:
    """By a factor of two a step at most; then the norms have it, and the schedule's share."""
    model = tiny_llava()
    pre = apply_pre(model, weight=3.0, watch_steps=1, gradient_ratio=0.2)
    options: dict[str, Any] = {"per_device_train_batch_size": 8, "learning_rate": 0.0}
    trainer = make_trainer(model, tmp_path, num_train_epochs=12, **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    ratios = [log[PRE] / log[LM] for log in logs]
    weights = [log["pre_weight"] for log in logs]
    assert weights[0] == 3.0 and ratios[0] != pytest.approx(0.2, rel=0.5)
    for before, after, ratio in zip(weights, weights[1:], ratios, strict=False):
        change = min(max(0.2 / ratio, 0.5), 2.0)
        assert after / before == pytest.approx(change, rel=1e-5)
    assert ratios[-1] == pytest.approx(0.2, rel=1e-4)
    remove_pre(model)
    g, p = definition(pre.heads, make_rows(), weights[-1])
    assert p.norm() / g.norm() == pytest.approx(0.2, rel=1e-4)


def test_a_schedule_multiplies_the_ratio(tmp_path: Path) -> None:
    model = tiny_llava()
    apply_pre(model, weight=3.0, watch_steps=1, gradient_ratio=0.2, weight_schedule="linear")
    trainer = make_trainer(
        model, tmp_path, num_train_epochs=20, per_device_train_batch_size=8, learning_rate=0.0
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for step in range(12, 20):
        ratio = logs[step][PRE] / logs[step][LM]
        assert ratio == pytest.approx(0.2 * (1 - step / 20), rel=1e-4)


def test_a_callback_follows_the_schedule(tmp_path: Path) -> None:
    """In a plain Trainer; it watches too, and leads to no ratio."""
    callback = PReCallback(weight=3.0, weight_schedule="linear", watch_steps=2)
    make_trainer(
        tiny_llava(), tmp_path, Trainer, rows=make_rows((1, 1, 2, 2)), callbacks=[callback],
        per_device_train_batch_size=1,
    ).train()  # fmt: skip
    assert callback.pre is not None and callback.pre.weight == pytest.approx(0.75)
    trainer = make_trainer(
        tiny_llava(), tmp_path, Trainer, rows=make_rows((1, 1, 2, 2)),
        per_device_train_batch_size=1, callbacks=[PReCallback(weight=3.0, watch_steps=2)],
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [COSINE in log for log in logs] == [True, True, False, True]
    with pytest.raises(ValueError, match="gradient_ratio: PReCallback does not see"):
        make_trainer(
            tiny_llava(), tmp_path, Trainer,
            callbacks=[PReCallback(watch_steps=2, gradient_ratio=0.1)],
        ).train()  # fmt: skip


@pytest.mark.parametrize("settings, message", (
    ({"gradient_ratio": 0.1}, "gradient_ratio: needs watch_steps"),
    ({"gradient_ratio": 0.1, "watch_steps": 5, "weight": 0.0}, "gradient_ratio: needs watch_steps"),
    ({"gradient_ratio": 0.0, "watch_steps": 5}, "gradient_ratio: expected a positive"),
    ({"weight_schedule": "step"}, "weight_schedule: expected one of constant, linear, cosine"),
    ({"weight_warmup_steps": -1}, "weight_warmup_steps: expected a non-negative"),
    ({"watch_steps": 0}, "watch_steps: expected an integer of at least 1"),
))  # fmt: skip
def test_settings_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PReConfig(**settings)


@pytest.mark.parametrize("by", ("the trainer", "hand"))
def test_a_ratio_in_a_compiled_model(tmp_path: Path, by: str) -> None:
    """Its graph shows no gradients, so the weight would stay as it was."""
    model = tiny_llava()
    apply_pre(model, watch_steps=1, gradient_ratio=0.2)
    how: dict[str, Any] = {}
    if by == "hand":
        model.compile(backend="eager")
    else:
        how = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = make_trainer(model, tmp_path, max_steps=1, **how)
    with pytest.raises(ValueError, match="gradient_ratio: a graph of the whole model"):
        trainer.train()
