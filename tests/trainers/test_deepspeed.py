# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed ZeRO-2 and ZeRO-3 on two ranks: gradients, steps, and the heads in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, remove_pre
from tests.attached import compare
from tests.helpers import relative_error
from tests.tiny import PATCHES, tiny_llava
from tests.trainers import deepspeed_ranks, low_precision_ranks, ranks
from tests.trainers.rows import WEIGHT, eager_gradients, make_rows, make_trainer

pytestmark = pytest.mark.packages
each_stage = pytest.mark.parametrize("stage", deepspeed_ranks.STAGES)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deepspeed")
    ranks.run(path, deepspeed_ranks.work)
    return path


def read(out: Path, case: str, stage: int) -> list[Any]:
    return [torch.load(out / f"{case} {stage} {rank}.pt") for rank in range(ranks.RANKS)]


@each_stage
def test_gradients_are_those_of_the_whole_batch(out: Path, stage: int) -> None:
    model = tiny_llava()
    pre = apply_pre(model)
    remove_pre(model)
    expected = eager_gradients(pre.heads, make_rows(ranks.BOTH))
    expected = {name: x for name, x in expected.items() if not ranks.vision(name)}
    for ours, after, sharded, metrics in read(out, "loop", stage):
        compare(ours, expected)
        stepped = pre.heads[2].weight_1 - 0.1 * expected["pre_heads.2.weight_1"]
        torch.testing.assert_close(after, stepped.detach(), rtol=1e-5, atol=1e-6)
        assert sharded and metrics["visual_tokens"] == sum(ranks.BOTH) * PATCHES


@each_stage
def test_training_is_that_of_one_process(out: Path, tmp_path: Path, stage: int) -> None:
    """Uninterrupted, or resumed from other weights and heads."""
    model = tiny_llava()
    ranks.freeze_vision(model)
    pre = apply_pre(model, weight=WEIGHT)
    trainer = make_trainer(
        model, tmp_path, per_device_train_batch_size=8, max_steps=2, rows=make_rows(ranks.BOTH),
        optim="sgd",
    )  # fmt: skip
    trainer.train()
    values = [log["pre_loss"] for log in trainer.state.log_history if "pre_loss" in log]
    for runs in read(out, "trainer", stage):
        for head, logs in runs:
            for ours, expected in zip(head, pre.heads[2].parameters(), strict=True):
                torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)
            found = [log["pre_loss"] for log in logs if "pre_loss" in log]
            assert found == pytest.approx(values, rel=1e-4)
        assert all(map(torch.equal, runs[0][0], runs[1][0]))


@each_stage
def test_a_bfloat16_model(out: Path, stage: int) -> None:
    """The engine casts the heads, and steps on float32 copies of them, in which weights move."""
    expected = low_precision_ranks.alone()
    for found in read(out, "low precision", stage):
        assert len(found) == (2 if stage == 3 else 1)
        for grads, before, after in found:
            assert grads.keys() == expected.keys()
            for (name, grad), old, new in zip(grads.items(), before, after, strict=True):
                assert relative_error(grad, expected[name]) < 0.01, name
                assert old.dtype == torch.float32
                torch.testing.assert_close(new, old - 1e-4 * grad, rtol=0, atol=1e-8)
