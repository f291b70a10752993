# SPDX-License-Identifier: Apache-2.0
"""An encoder of text with a decoder: its labels are a text of their own, and each is predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from prereg_kernels import apply_pre
from tests.helpers import relative_error
from tests.zoo import CASES, sample

PAIRS = [name for name in ("t5gemma2", "florence2") if name in CASES]

ANSWERS = {
    "two tokens": [[5, 2], [12, 2]],
    "one token": [[5], [12]],
    "uneven": [[5, 2, -100, -100, -100, -100], [5, 31, 17, 8, 23, 2]],
}


def gradients_of(name: str, calls: list[dict[str, Any]]) -> tuple[list[torch.Tensor], list[float]]:
    """Of the head, summed over these calls, and each call's `lm_loss`."""
    case = sample(name)
    pre = apply_pre(case.model, weight=0.5)
    batch, lm = case.batches["images"].inputs, []
    for arguments in calls:
        case.model(**{**batch, **arguments}).loss.backward()
        lm.append(pre.metrics()["lm_loss"])
    [head] = pre.heads.values()
    return [x.grad.clone() for x in head.parameters()], lm


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("name", PAIRS)
def test_the_count_of_a_step_leaves_the_term_as_it_is(name: str, answers: list[list[int]]) -> None:
    """transformers' Trainer counts all labels of such a model. PRe counted those behind the first:
    of answers of two tokens the term had half of its weight, and of one token none."""
    labels = torch.tensor(answers)
    expected, [loss] = gradients_of(name, [{"labels": labels}])
    count = (labels != -100).sum()
    found, [same] = gradients_of(name, [{"labels": labels, "num_items_in_batch": count}])
    assert max(map(relative_error, found, expected)) < 1e-5
    assert same == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_the_shares_of_a_step_are_one(name: str) -> None:
    """Of two micro-batches, by their labels: 4 and 6 of 10."""
    labels = [torch.tensor([[5, 2], [12, 2]]), torch.tensor([[5, 3, 8], [9, 9, 9]])]
    count = sum((x != -100).sum() for x in labels)
    found, _ = gradients_of(name, [{"labels": x, "num_items_in_batch": count} for x in labels])
    expected, _ = gradients_of(name, [{"labels": labels[0]}])  # the images are the same
    assert max(map(relative_error, found, expected)) < 1e-5


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_of_trainer(name: str, tmp_path: Any) -> None:
    """Trainer's own count, through its own training_step."""
    labels = torch.tensor(ANSWERS["two tokens"])
    expected, _ = gradients_of(name, [{"labels": labels}])
    case = sample(name)
    [head] = apply_pre(case.model, weight=0.5).heads.values()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(case.model, arguments)
    batch = {**case.batches["images"].inputs, "labels": labels}
    [inputs], count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert int(count) == 4
    trainer.training_step(case.model, inputs, count)
    found = [x.grad for x in head.parameters()]
    assert max(map(relative_error, found, expected)) < 1e-5
