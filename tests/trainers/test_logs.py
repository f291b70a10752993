# SPDX-License-Identifier: Apache-2.0
"""PReTrainer's figures: means over the steps since the last log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import prereg_kernels
from prereg_kernels import apply_pre, remove_pre
from tests.attached import eager_term
from tests.releases import HERE
from tests.tiny import IMAGE_TOKEN, tiny_llava
from tests.trainers.rows import collate, make_rows, make_trainer

PACKAGE = Path(prereg_kernels.__file__).parent
STEPS = 2  # of the two windows that the rows make

ROUNDED = 0 if HERE >= (5, 0) else 5e-5  # before, Trainer rounds its loss in the logs


def train(out: Path, accepts_loss_kwargs: bool = True, **config: Any) -> tuple[Any, Any]:
    """One window over all rows, two steps of two micro-batches of two rows; lr 0."""
    model = tiny_llava()
    model.accepts_loss_kwargs = accepts_loss_kwargs
    pre = apply_pre(model, **config)
    trainer = make_trainer(
        model, out, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=STEPS, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    remove_pre(model)
    return trainer, pre


def expected(heads: Any, accepts_loss_kwargs: bool = True) -> tuple[float, float, list[float]]:
    """L_LM, L_PRe over the window, and L_PRe of each step."""
    model, rows = tiny_llava(), make_rows()
    with torch.no_grad():
        micro = [eager_term(model, collate(rows[i : i + 2]), heads)[0] for i in range(0, 8, 2)]
        halves = [eager_term(model, collate(rows[i : i + 4]), heads) for i in (0, 4)]
        _, whole = eager_term(model, collate(rows), heads)
    lm = torch.stack([lm for lm, _ in halves] if accepts_loss_kwargs else micro).mean()
    return lm.item(), whole.item(), [term.item() for _, term in halves]


@pytest.mark.parametrize("accepts_loss_kwargs", (False, True))
def test_figures_of_a_window(tmp_path: Path, accepts_loss_kwargs: bool) -> None:
    trainer, pre = train(tmp_path, accepts_loss_kwargs)
    lm, term, steps = expected(pre.heads, accepts_loss_kwargs)
    assert abs(sum(steps) / 2 - term) > 1e-3 * abs(term)  # weighted by tokens is not by steps
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert log["pre_loss"] == pytest.approx(term, rel=1e-5)
    assert log["loss"] == pytest.approx(log["lm_loss"], rel=1e-6, abs=ROUNDED)
    assert not any("layer" in name for name in log)


def test_value_in_forward_is_in_the_loss_alone(tmp_path: Path) -> None:
    trainer, pre = train(tmp_path, value_in_forward=True, weight=2.0)
    lm, term, steps = expected(pre.heads)
    log = trainer.state.log_history[0]
    assert log["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert log["pre_loss"] == pytest.approx(term, rel=1e-5)
    assert log["loss"] == pytest.approx(lm + 2 * sum(steps) / 2, rel=1e-5, abs=ROUNDED)


def test_several_layers(tmp_path: Path) -> None:
    trainer, pre = train(tmp_path, layers=(1, 3))
    log = trainer.state.log_history[0]
    assert log["pre_loss"] == pytest.approx(expected(pre.heads)[1], rel=1e-5)
    for layer in (1, 3):
        single = expected({layer: pre.heads[layer]})[1]
        assert log[f"pre_loss/layer_{layer}"] == pytest.approx(single, rel=1e-5)


def test_windows_do_not_leak_into_each_other(tmp_path: Path) -> None:
    model, rows = tiny_llava(), make_rows((1, 2, 2, 1))
    pre = apply_pre(model)
    trainer = make_trainer(
        model, tmp_path, rows=rows, per_device_train_batch_size=1, learning_rate=0.0,
        logging_steps=1, num_train_epochs=2,
    )  # fmt: skip
    trainer.train()
    remove_pre(model)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 8
    with torch.no_grad():
        for log, row in zip(logs, rows * 2, strict=True):
            lm, term = eager_term(model, collate([row]), pre.heads)
            assert log["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
            assert log["pre_loss"] == pytest.approx(term.item(), rel=1e-5)


def test_a_run_has_nothing_of_one_that_was_interrupted(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model, stop = tiny_llava(), Stop()
    apply_pre(model)
    trainer = make_trainer(
        model, tmp_path, per_device_train_batch_size=4, logging_steps=STEPS, learning_rate=0.0,
        callbacks=[stop],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    lm, term, _ = expected(trainer.pre.heads)
    assert log["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert log["pre_loss"] == pytest.approx(term, rel=1e-5)


def test_other_logs_are_left_alone(tmp_path: Path) -> None:
    """A user's log of some loss takes no figures, nor does that of an evaluation."""

    class Own(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            trainer.log({"loss": 1.0})

    model = tiny_llava()
    apply_pre(model)
    rows = make_rows()
    trainer = make_trainer(
        model, tmp_path, rows=rows, eval_dataset=rows, eval_strategy="steps", eval_steps=1,
        callbacks=[Own()],
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    with_figures = [log for log in history if "pre_loss" in log]
    assert len(with_figures) == 1 and "learning_rate" in with_figures[0]
    assert len([log for log in history if log.get("loss") == 1.0]) == 1
    assert any("eval_loss" in log for log in history)


# arguments.py checks values on CPUs alone; the others look at the first step of a kind, as
# tests/attach/test_first_steps.py says.
ELSEWHERE = ("arguments.py", "first_steps.py", "embedded_rows.py")


def test_the_figures_are_read_at_logging_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a number waits for the device."""
    reads: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self: Any, *args: Any, name: str = name, original: Any = original) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            if caller.is_relative_to(PACKAGE) and caller.name not in ELSEWHERE:
                reads.append(f"{caller.name}: {name}")
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    trainer, _ = train(tmp_path)
    assert sum((make_rows()[0]["input_ids"] == IMAGE_TOKEN).tolist()) > 0
    assert trainer.state.global_step == STEPS
    assert reads == ["trainer.py: tolist"]  # the window, at its end
