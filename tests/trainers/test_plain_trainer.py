# SPDX-License-Identifier: Apache-2.0
"""What transformers' own Trainer does with a model that PRe is attached to, as documented."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from prereg_kernels import PReHead, apply_pre, remove_pre
from tests.attached import compare, eager_term
from tests.helpers import relative_error
from tests.tiny import IMAGE_TOKEN, tiny_llava
from tests.trainers.rows import WEIGHT, Row, collate, eager_gradients, make_rows, step_gradients


def step_of(
    out: Path, rows: list[Row], size: int, count: int, accepts_loss_kwargs: bool = True
) -> tuple[dict[str, Tensor], dict[int, PReHead]]:
    """A step's gradients, and the heads."""
    model = tiny_llava()
    model.accepts_loss_kwargs = accepts_loss_kwargs
    pre = apply_pre(model, weight=WEIGHT)
    (step,) = step_gradients(model, out, size, count, cls=Trainer, rows=rows)
    remove_pre(model)
    return step, pre.heads


def head_gradients(
    heads: dict[int, PReHead], batches: Sequence[list[Row]], shares: Sequence[float]
) -> dict[str, Tensor]:
    """Of the sum of each micro-batch's share times its mean of L_PRe."""
    model = tiny_llava()
    terms = [eager_term(model, collate(batch), heads)[1] for batch in batches]
    for head in heads.values():
        head.zero_grad()
    (WEIGHT * sum(s * term for s, term in zip(shares, terms, strict=True))).backward()
    named = [(n, p) for layer in heads for n, p in heads[layer].named_parameters(f"{layer}")]
    return {f"pre_heads.{name}": p.grad for name, p in named}


@pytest.mark.parametrize("accepts_loss_kwargs", (False, True))
@pytest.mark.parametrize("size, count", ((8, 1), (2, 4), (1, 8)))
def test_exact_where_all_micro_batches_are_alike(
    tmp_path: Path, accepts_loss_kwargs: bool, size: int, count: int
) -> None:
    rows = make_rows((1,) * 8, (5,) * 8)
    ours, heads = step_of(tmp_path, rows, size, count, accepts_loss_kwargs)
    compare(ours, eager_gradients(heads, rows))


@pytest.mark.parametrize("size, count", ((2, 2), (1, 4)))
def test_exact_where_labels_and_visual_tokens_have_the_same_shares(
    tmp_path: Path, size: int, count: int
) -> None:
    rows = make_rows((1, 2, 3, 1), (2, 4, 6, 2))
    ours, heads = step_of(tmp_path, rows, size, count)
    compare(ours, eager_gradients(heads, rows))


@pytest.mark.parametrize("accepts_loss_kwargs", (False, True))
def test_otherwise_each_micro_batch_counts_by_its_share(
    tmp_path: Path, accepts_loss_kwargs: bool
) -> None:
    """Of the labels, or of the micro-batches: a mean of means, never a sum of them."""
    rows = make_rows((1, 2, 1, 0, 2, 1, 0, 3))
    ours, heads = step_of(tmp_path, rows, 2, 4, accepts_loss_kwargs)
    batches = [rows[start : start + 2] for start in range(0, 8, 2)]
    labels = [sum(int((row["labels"] != -100).sum()) for row in batch) for batch in batches]
    shares = [n / sum(labels) for n in labels] if accepts_loss_kwargs else [0.25] * 4
    exact = eager_gradients(heads, rows)
    exact = {name: exact[name].clone() for name in exact if "pre_heads" in name}
    for name, x in head_gradients(heads, batches, shares).items():
        assert relative_error(ours[name], x) < 2e-5
        assert relative_error(ours[name], exact[name]) > 1e-3  # what PReTrainer is for
        assert 0.5 < ours[name].norm() / exact[name].norm() < 2
    assert any(int((row["input_ids"] == IMAGE_TOKEN).sum()) == 0 for row in rows)
    assert torch.isfinite(torch.stack([x.norm() for x in ours.values()])).all()
