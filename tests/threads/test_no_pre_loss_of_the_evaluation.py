# SPDX-License-Identifier: Apache-2.0
"""I asked for L_PRe in evaluation by value_in_eval, and my logs have eval_loss alone.

The kernel computed it for every batch, and the trainer threw it away.

The metrics of `evaluate` and `predict` have it, as the mean over all visual tokens of their set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from prereg_kernels import apply_pre, eager_pre_loss, remove_pre
from prereg_kernels.trainers import PReTrainer
from tests.attached import seen
from tests.tiny import IMAGE_TOKEN, PATCHES, tiny_llava
from tests.trainers.rows import Row, collate, make_rows, make_trainer

LAYERS = (1, 3)
IMAGES = (1, 3, 0, 2, 1)  # in batches of two, uneven, and a last one of one row


def make(out: Path, rows: Any = None, **arguments: Any) -> tuple[Any, Any]:
    model = tiny_llava()
    settings = {"value_in_eval": True, "layers": LAYERS} | arguments.pop("settings", {})
    pre = apply_pre(model, **settings)
    trainer = make_trainer(
        model, out, rows=make_rows(IMAGES), eval_dataset=rows, per_device_eval_batch_size=2,
        prediction_loss_only=True, **arguments,
    )  # fmt: skip
    return trainer, pre


def expected(heads: Any, rows: Sequence[Row], level: str = "patch") -> dict[str, float]:
    """By the definition, of the rows one by one."""
    model, sums, count = tiny_llava().eval(), dict.fromkeys(heads, 0.0), 0
    for row in rows:
        batch = collate([row])
        with seen(model) as states, torch.no_grad():
            model(**batch)
        mask = batch["input_ids"] == IMAGE_TOKEN
        for layer, head in heads.items():
            hidden, anchor = states[layer][mask], states[0][mask]
            if level == "global":
                hidden, anchor = (x.unflatten(0, (-1, PATCHES)).mean(1) for x in (hidden, anchor))
            losses = eager_pre_loss(
                hidden, anchor, head.weights, head.biases, reduction="none", upcast=torch.float64
            )
            sums[layer] += losses.sum().item()
        count += hidden.shape[0]
    figures = {f"pre_loss/layer_{layer}": total / count for layer, total in sums.items()}
    return {"pre_loss": sum(figures.values()) / len(figures)} | figures


def check(metrics: dict[str, float], prefix: str, figures: dict[str, float]) -> None:
    found = {name for name in metrics if "pre_loss" in name and name.startswith(prefix)}
    assert found == {f"{prefix}_{name}" for name in figures}
    for name, value in figures.items():
        assert metrics[f"{prefix}_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("level", ("patch", "global"))
def test_of_evaluate_and_predict(tmp_path: Path, level: str) -> None:
    rows, others = make_rows(IMAGES, seed=1), make_rows((2, 0, 1), seed=2)
    trainer, pre = make(tmp_path, rows, settings={"level": level})
    check(trainer.evaluate(), "eval", expected(pre.heads, rows, level))
    check(trainer.predict(others).metrics, "test", expected(pre.heads, others, level))
    check(trainer.evaluate(others, metric_key_prefix="x"), "x", expected(pre.heads, others, level))
    log = next(log for log in trainer.state.log_history if "eval_loss" in log)
    check(log, "eval", expected(pre.heads, rows, level))


def test_of_several_sets(tmp_path: Path) -> None:
    sets = {"one": make_rows(IMAGES, seed=1), "two": make_rows((2, 0, 1), seed=2)}
    trainer, pre = make(tmp_path, sets)
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        check(metrics, f"eval_{name}", expected(pre.heads, rows))


def test_of_a_set_without_labels(tmp_path: Path) -> None:
    rows = [{name: x for name, x in row.items() if name != "labels"} for row in make_rows(IMAGES)]
    trainer, pre = make(tmp_path)
    trainer.data_collator = lambda batch: {
        name: x
        for name, x in collate([row | {"labels": row["input_ids"]} for row in batch]).items()
        if name != "labels"
    }
    check(trainer.predict(rows).metrics, "test", expected(pre.heads, make_rows(IMAGES)))


def test_of_a_set_without_images(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, make_rows((0, 0)))
    assert trainer.evaluate()["eval_pre_loss"] == 0


def test_amid_training(tmp_path: Path) -> None:
    """By it the best model is found; the figures of training have none of it."""
    rows = make_rows(IMAGES, seed=1)
    trainer, pre = make(
        tmp_path, rows, eval_strategy="steps", eval_steps=1, learning_rate=0.0, logging_steps=2,
        per_device_train_batch_size=3, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_pre_loss",
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    evaluated = [log for log in history if "eval_pre_loss" in log]
    assert len(evaluated) == 2 and trainer.state.best_metric == evaluated[0]["eval_pre_loss"]
    for log in evaluated:
        check(log, "eval", expected(pre.heads, rows))
    log = next(log for log in history if "lm_loss" in log)
    remove_pre(trainer.model)
    assert log["pre_loss"] == pytest.approx(
        expected(pre.heads, make_rows(IMAGES))["pre_loss"], rel=1e-5
    )


@pytest.mark.parametrize("cls", (PReTrainer, Trainer))
def test_not_where_nobody_asks(tmp_path: Path, cls: type[Trainer]) -> None:
    settings = {"value_in_eval": cls is Trainer}  # which knows nothing of it
    trainer, _ = make(tmp_path, make_rows(IMAGES), cls=cls, settings=settings)
    assert not any("pre_loss" in name for name in trainer.evaluate())
