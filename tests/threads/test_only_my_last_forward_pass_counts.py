# SPDX-License-Identifier: Apache-2.0
"""My compute_loss calls the model for two views of the batch, and PRe sees the second one alone.

The term of a call took the place of the one before, so that of the first pass was lost: of two
views, of a batch's halves, of the pair of a contrastive loss.

The term of a micro-batch is the mean over the visual tokens of all of its passes, and weighs in the
step as its batch does, however often, or how far, that was seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.trainers import PReTrainerMixin
from tests.attached import compare, eager_term
from tests.tiny import IMAGE_TOKEN, PATCHES, gradients, tiny_llava
from tests.trainers.rows import (
    IMAGES,
    WEIGHT,
    Row,
    collate,
    make_rows,
    make_trainer,
    step_gradients,
)

Batch = Mapping[str, Tensor]


def whole(batch: Batch) -> list[Batch]:
    return [batch]


def two_views(batch: Batch) -> list[Batch]:
    """As it is, and its images upside down."""
    images = {"pixel_values": batch["pixel_values"].flip(2)} if "pixel_values" in batch else {}
    return [batch, {**batch, **images}]


def rows_apart(batch: Batch) -> list[Batch]:
    """Each row by itself."""
    images = (batch["input_ids"] == IMAGE_TOKEN).sum(dim=1).div(PATCHES).long().tolist()
    pixels = batch.get("pixel_values", torch.zeros(0)).split(images)
    parts = []
    for row, values in enumerate(pixels):
        part = {name: x[row : row + 1] for name, x in batch.items() if name != "pixel_values"}
        parts.append(part | ({"pixel_values": values} if len(values) else {}))
    return parts


def first_row(batch: Batch) -> list[Batch]:
    return rows_apart(batch)[:1]


class Passes(Trainer):
    """A loss of a pass for each part of the batch, in the model's own normalisation."""

    parts: Callable[[Batch], list[Batch]] = staticmethod(two_views)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        passes = [
            model(**part, num_items_in_batch=num_items_in_batch) for part in self.parts(inputs)
        ]
        return sum(each.loss for each in passes)


class PRePasses(PReTrainerMixin, Passes):
    """With PRe."""


class PassesBeside(Passes):
    """And some that are not its model's, or not for training."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        other = copy.deepcopy(model)
        with torch.no_grad():
            model(**inputs)
            other(**inputs)
        other(**inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        copy.deepcopy(model)(**inputs)
        return loss


class PRePassesBeside(PReTrainerMixin, PassesBeside):
    """With PRe."""


def by_definition(heads: Any, batches: list[list[Row]], parts: Any) -> dict[str, Tensor]:
    """The gradients of a step, by what the layers of a model without PRe have."""
    model = tiny_llava()
    counts = [sum(int((row["input_ids"] == IMAGE_TOKEN).sum()) for row in rows) for rows in batches]
    labels = sum(int((row["labels"][1:] != -100).sum()) for rows in batches for row in rows)
    for head in heads.values():
        head.zero_grad()
    for rows, count in zip(batches, counts, strict=True):
        passes = parts(collate(rows))
        seen = sum(int((part["input_ids"] == IMAGE_TOKEN).sum()) for part in passes)
        for part in passes:
            lm, term = eager_term(model, part, heads, denominator=max(seen, 1))
            answers = int((part["labels"][:, 1:] != -100).sum())
            (lm * answers / labels + WEIGHT * term * count / sum(counts)).backward()
    named = {f"pre_heads.{n}.{k}": p for n, h in heads.items() for k, p in h.named_parameters()}
    return gradients(model) | {name: p.grad for name, p in named.items()}


@pytest.mark.parametrize("size", (8, 4, 2))
@pytest.mark.parametrize("parts", (whole, two_views, rows_apart, first_row))
@pytest.mark.parametrize("cls", (PRePasses, PRePassesBeside))
def test_the_gradients_of_a_step(
    tmp_path: Path, cls: type[Trainer], parts: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Passes, "parts", staticmethod(parts))
    model, rows = tiny_llava(), make_rows()
    pre = apply_pre(model, weight=WEIGHT, value_in_eval=True)
    (ours,) = step_gradients(model, tmp_path, size, len(rows) // size, cls=cls)
    remove_pre(model)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    compare(ours, by_definition(pre.heads, batches, parts))


def test_the_figures_are_of_all_passes(tmp_path: Path) -> None:
    model, rows = tiny_llava(), make_rows()
    pre = apply_pre(model)
    trainer = make_trainer(
        model, tmp_path, cls=PRePasses, per_device_train_batch_size=4, logging_steps=2,
        learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    remove_pre(model)
    with torch.no_grad():
        views = [eager_term(model, view, pre.heads)[1] for view in two_views(collate(rows))]
    log = next(log for log in trainer.state.log_history if "pre_loss" in log)
    assert log["pre_loss"] == pytest.approx(torch.stack(views).mean().item(), rel=1e-5)
    assert abs(views[0] - views[1]) > 1e-3 and sum(IMAGES) > 0


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    """`collecting` gives the terms, and leaves `add_to_loss` as it was."""
    model, batch = tiny_llava(), collate(make_rows())
    pre = apply_pre(model, weight=WEIGHT)
    plain = model(**batch)
    with pre.collecting() as passes:
        losses = [model(**part).loss for part in two_views(batch)]
    (sum(losses) + sum(each.term for each in passes)).backward()
    ours = gradients(model)
    assert pre.add_to_loss and len(passes) == 2 and torch.equal(losses[0], plain.loss)
    model.zero_grad()
    for part in two_views(batch):
        model(**part).loss.backward()  # with its term in it
    compare(ours, gradients(model))
