# SPDX-License-Identifier: Apache-2.0
"""GRPO with PRe dies in its first step: sequence item 0: expected str instance, dict found.

Its batch is a list of prompts, which become ids and images when the step prepares its inputs. The
visual tokens of a step cannot be counted before that, and the error that said so took the list for
names.

A micro-batch that cannot be counted is divided by what its passes see, on all ranks, and a step is
the mean of its micro-batches. Where `count_rows` knows the form of the batch, it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.trainers import PReTrainerMixin
from tests.attached import compare, eager_term
from tests.tiny import IMAGE_TOKEN, gradients, tiny_llava
from tests.trainers.rows import (
    WEIGHT,
    Row,
    collate,
    eager_gradients,
    make_rows,
    make_trainer,
    step_gradients,
)


class Listed(Trainer):
    """The batch is a list until the step prepares it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"data_collator": list})

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(collate(inputs))


class PReListed(PReTrainerMixin, Listed):
    """With PRe."""


class DividesItself(Listed):
    """As TRL's trainers of this kind: the loss is divided by the micro-batches where it is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_loss_func = "anything, so that Trainer does not divide"

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss / self.current_gradient_accumulation_steps


class PReDividesItself(PReTrainerMixin, DividesItself):
    """With PRe."""


class Counted(PReListed):
    """One that knows what is in the list."""

    def count_rows(self, batch: Sequence[Row]) -> Tensor:
        return sum((row["input_ids"] == IMAGE_TOKEN).sum() for row in batch)


def batches_of(size: int) -> list[list[Row]]:
    rows = make_rows()
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def mean_of_micro_batches(heads: Any, size: int) -> dict[str, Tensor]:
    """The gradients of the mean of each micro-batch's L_LM + weight * L_PRe."""
    model, batches = tiny_llava(), batches_of(size)
    for head in heads.values():
        head.zero_grad()
    for rows in batches:
        lm, term = eager_term(model, collate(rows), heads)
        ((lm + WEIGHT * term) / len(batches)).backward()
    named = {f"pre_heads.{n}.{k}": p for n, h in heads.items() for k, p in h.named_parameters()}
    return gradients(model) | {name: p.grad for name, p in named.items()}


def step_of(out: Path, cls: type[Trainer], size: int) -> tuple[dict[str, Tensor], Any]:
    model = tiny_llava()
    pre = apply_pre(model, weight=WEIGHT)
    (ours,) = step_gradients(model, out, size, len(make_rows()) // size, cls=cls)
    remove_pre(model)
    return ours, pre.heads


@pytest.mark.parametrize("size", (8, 4, 2))
@pytest.mark.parametrize("cls", (PReListed, PReDividesItself))
def test_each_micro_batch_is_divided_by_what_it_sees(
    tmp_path: Path, cls: type[Trainer], size: int
) -> None:
    ours, heads = step_of(tmp_path, cls, size)
    compare(ours, mean_of_micro_batches(heads, size))


@pytest.mark.parametrize("size", (8, 4, 2))
def test_a_list_that_is_counted_is_exact(tmp_path: Path, size: int) -> None:
    ours, heads = step_of(tmp_path, Counted, size)
    compare(ours, eager_gradients(heads, make_rows(), groups=batches_of(size)))


@pytest.mark.parametrize("micro_batches, said", ((1, 0), (2, 1)))
def test_it_is_said_where_it_is_not_the_steps_mean(
    tmp_path: Path, micro_batches: int, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    logger = SimpleNamespace(warning_once=lines.append)
    monkeypatch.setattr("prereg_kernels.trainers.trainer.logger", logger)
    step_of(tmp_path, PReListed, len(make_rows()) // micro_batches)
    assert len(lines) == said
    assert all("batch of type list" in line and "override count_rows" in line for line in lines)


@pytest.mark.parametrize("batch", ([{"prompt": "?"}], {"ids": torch.zeros(1, 1)}, "text"))
def test_batches_of_any_type(tmp_path: Path, batch: Any) -> None:
    model = tiny_llava()
    pre = apply_pre(model)
    trainer = make_trainer(model, tmp_path, cls=PReListed)
    batches, _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert batches == [batch] and pre.denominator == 1


def test_the_figures_are_the_mean_over_all_rows(tmp_path: Path) -> None:
    model, rows = tiny_llava(), make_rows()
    pre = apply_pre(model)
    trainer = make_trainer(
        model, tmp_path, cls=PReListed, per_device_train_batch_size=2, logging_steps=2,
        gradient_accumulation_steps=2, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    remove_pre(model)
    with torch.no_grad():
        _, term = eager_term(model, collate(rows), pre.heads)
        lm = [eager_term(model, collate(batch), pre.heads)[0] for batch in batches_of(2)]
    log = next(log for log in trainer.state.log_history if "pre_loss" in log)
    assert log["pre_loss"] == pytest.approx(term.item(), rel=1e-5)
    assert log["lm_loss"] == pytest.approx(torch.stack(lm).mean().item(), rel=1e-5)
