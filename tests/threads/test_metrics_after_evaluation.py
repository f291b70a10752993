# SPDX-License-Identifier: Apache-2.0
"""pre.metrics() raises after evaluation, or shows a fraction of the loss that the trainer logs.

Tensors of `torch.inference_mode` have no version, by which metrics() told whether backward had run.
Under gradient accumulation the model returns its share of the step's loss, which is not its mean.
"""

from __future__ import annotations

import pytest
import torch

from prereg_kernels import apply_pre
from tests.tiny import PATCHES, gradients, make_batch, tiny_llava


@pytest.mark.parametrize("level", ("patch", "global"))
def test_after_inference_mode(level: str) -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model, value_in_eval=True, level=level)
    model.eval()
    with torch.no_grad():
        model(**batch)
    expected, totals = pre.metrics(), pre.totals()
    with torch.inference_mode():
        model(**batch)
        assert pre.metrics() == expected
    assert pre.metrics() == expected and totals is not None
    assert torch.equal(pre.totals(), totals)
    model.train()
    model(**batch).loss.backward()
    assert pre.metrics()["pre_loss"] == pytest.approx(expected["pre_loss"], rel=1e-5)


def test_a_model_compiled_under_inference_mode_trains() -> None:
    model, batch = tiny_llava(), make_batch((0, 0))
    pre = apply_pre(model, value_in_eval=True)
    call = torch.compile(model, backend="aot_eager")
    with torch.inference_mode():
        model.eval()
        call(**batch)
    model.train()
    call(**batch).loss.backward()
    assert pre.metrics()["pre_loss"] == 0
    assert gradients(model)["pre_heads.2.weight_0"].norm() == 0


@pytest.mark.parametrize("items", ("tensor", "number"))
def test_the_loss_of_a_micro_batch_is_its_mean(items: str) -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model)
    mean = model(**batch).loss.item()
    count = 5 * (batch["labels"][:, 1:] != -100).sum()
    loss = model(**batch, num_items_in_batch=count if items == "tensor" else int(count)).loss
    assert loss.item() == pytest.approx(mean / 5, rel=1e-5)
    assert pre.metrics()["lm_loss"] == pytest.approx(mean, rel=1e-5)


def test_no_labels_no_loss() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    batch["labels"][:] = -100
    model(**batch, num_items_in_batch=torch.tensor(0)).loss.backward()
    assert "lm_loss" not in pre.metrics()


def test_ranks_that_share_a_batch_count_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks, in tensor-parallel pairs."""
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model)
    model(**batch).loss.backward()
    alone = pre.metrics()
    monkeypatch.setattr("prereg_kernels._util.distributed.is_running", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(4))
    monkeypatch.setattr(type(model), "tp_size", 2, raising=False)
    together = pre.metrics()
    assert together.pop("visual_tokens") == 2 * alone.pop("visual_tokens") == 2 * 3 * PATCHES
    assert together == pytest.approx(alone)
