# SPDX-License-Identifier: Apache-2.0
"""After one batch whose answers were all cut off, every weight is NaN and the loss logs as 0.0.

An answer that `max_length` cuts off leaves a step whose labels are all -100. The term's share of
that step was computed as 0 labels of 0, which is NaN, and went into every gradient.

Such a step has no L_LM, and a plain Trainer, which weights the term by labels, has no term in it;
PReTrainer, which counts visual tokens, has it as in any other step. So has a plain Trainer of a
model whose labels it does not count.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.trainers import PReTrainer
from tests.attached import eager_term
from tests.tiny import PATCHES, tiny_llava
from tests.trainers.rows import WEIGHT, Row, collate, make_rows, make_trainer

RATE = 0.05
IMAGES = (1, 2, 1, 1, 2, 1)
CUT = 2  # of the micro-batches of a row each, the one whose answer is gone


def rows_with_a_cut_answer(cut: Sequence[int]) -> list[Row]:
    rows = make_rows(IMAGES)
    for number in cut:
        rows[number]["labels"] = torch.full_like(rows[number]["labels"], -100)
    return rows


def by_definition(rows: list[Row], accumulation: int, exact: bool) -> dict[str, Tensor]:
    """The weights after SGD on L_LM + weight * L_PRe, computed from the layers' outputs.

    `exact`: L_PRe is the mean over the step's visual tokens; else the mean of each micro-batch,
    weighted by its share of the step's labels.
    """
    model = tiny_llava()
    pre = apply_pre(model)
    heads = copy.deepcopy(pre.heads)
    remove_pre(model)
    named = dict(model.named_parameters())
    for layer, head in heads.items():
        named |= {f"pre_heads.{layer}.{name}": p for name, p in head.named_parameters()}
    for start in range(0, len(rows), accumulation):
        step = rows[start : start + accumulation]
        labels = [int((row["labels"][1:] != -100).sum()) for row in step]
        tokens = [int((row["input_ids"] == 39).sum()) for row in step]
        for p in named.values():
            p.grad = None
        for row, answer, visual in zip(step, labels, tokens, strict=True):
            lm, term = eager_term(model, collate([row]), heads)
            share = visual / sum(tokens) if exact else answer / max(sum(labels), 1)
            total = WEIGHT * share * term
            if answer:  # the model's own loss is the mean over these
                total = total + lm * answer / sum(labels)
            total.backward()
        with torch.no_grad():
            for p in named.values():
                if p.grad is not None:
                    p -= RATE * p.grad
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("cut", ((CUT,), (CUT, CUT + 1)))
@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("cls", (Trainer, PReTrainer))
def test_the_weights_after_a_run(
    tmp_path: Path, cls: type[Trainer], accumulation: int, cut: tuple[int, ...]
) -> None:
    """One micro-batch without labels, or two in a row, which are a whole step of either length."""
    rows = rows_with_a_cut_answer(cut)
    assert min(IMAGES) * PATCHES > 0
    model = tiny_llava()
    apply_pre(model, weight=WEIGHT)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(
        model, tmp_path, cls=cls, rows=rows, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=RATE,
    ).train()  # fmt: skip
    expected = by_definition(rows, accumulation, exact=cls is PReTrainer)
    ours = dict(model.named_parameters())
    assert ours.keys() == expected.keys()
    moved = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert {name for name in ours if "pre_heads" in name} < moved
    for name, p in ours.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_model_whose_labels_trainer_does_not_count(tmp_path: Path) -> None:
    """As Qwen-VL's and Gemma 3's. A step of one micro-batch has all of the term."""
    rows = rows_with_a_cut_answer((CUT,))
    model = tiny_llava()
    model.accepts_loss_kwargs = False
    apply_pre(model, weight=WEIGHT)
    make_trainer(
        model, tmp_path, cls=Trainer, rows=rows, per_device_train_batch_size=1, optim="sgd",
        learning_rate=RATE,
    ).train()  # fmt: skip
    expected = by_definition(rows, 1, exact=True)
    without = by_definition(rows, 1, exact=False)
    differs = {name for name, p in expected.items() if not torch.allclose(p, without[name])}
    assert {name for name in expected if "pre_heads" in name} <= differs
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    """The LM loss is averaged over the steps that have one; L_PRe over all visual tokens."""
    rows = rows_with_a_cut_answer((CUT,))
    model = tiny_llava()
    pre = apply_pre(model)
    trainer = make_trainer(
        model, tmp_path, rows=rows, per_device_train_batch_size=1, logging_steps=len(rows),
        learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    remove_pre(model)
    with torch.no_grad():
        pairs = [eager_term(model, collate([row]), pre.heads) for row in rows]
    lm = [lm for number, (lm, _) in enumerate(pairs) if number != CUT]
    terms = [term * images for images, (_, term) in zip(IMAGES, pairs, strict=True)]
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["lm_loss"] == pytest.approx(torch.stack(lm).mean().item(), rel=1e-5)
    assert log["pre_loss"] == pytest.approx(sum(terms).item() / sum(IMAGES), rel=1e-5)
