# SPDX-License-Identifier: Apache-2.0
"""Low precision around PRe: loss scaling, autocast, Trainer's bf16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre, remove_pre
from tests.attached import compare, eager_term
from tests.helpers import relative_error
from tests.tiny import gradients, make_batch, tiny_llava
from tests.trainers.rows import WEIGHT, eager_gradients, make_rows, step_gradients


def scaled_step(scale: float, dtype: torch.dtype | None) -> tuple[Any, Any, Any]:
    """The model, its optimizer and its scaler, before `step`."""
    model = tiny_llava()
    apply_pre(model, weight=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(**make_batch((1, 2))).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return model, optimizer, scaler


@pytest.mark.parametrize("scale", (2.0**4, 2.0**16))
def test_scaled_gradients_are_unscaled_to_the_same(scale: float) -> None:
    """In float32 a power of two is exact."""
    expected = gradients(scaled_step(1.0, None)[0])
    ours = gradients(scaled_step(scale, None)[0])
    assert all(torch.equal(ours[name], x) for name, x in expected.items())
    assert expected["pre_heads.2.weight_0"].norm() > 0


def mean_error(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Over the parameters whose gradient is more than rounding."""
    errors = [relative_error(ours[name], x) for name, x in truth.items() if x.norm() > 1e-4]
    assert len(errors) > 40
    return sum(errors) / len(errors)


def test_float16_gradients() -> None:
    """No further from float32 than the definition in autocast, under the same scale."""
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model, weight=3.0)
    remove_pre(model)
    found = []
    for enabled, scale in ((False, 1.0), (True, 2.0**10)):
        model.zero_grad()
        pre.heads[2].zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            lm, term = eager_term(model, batch, pre.heads)
        ((lm + 3.0 * term) * scale).backward()
        heads = {f"pre_heads.2.{name}": p.grad for name, p in pre.heads[2].named_parameters()}
        found.append({name: x / scale for name, x in (gradients(model) | heads).items()})
    truth, eager = found
    ours = gradients(scaled_step(2.0**10, torch.float16)[0])
    assert 0 < mean_error(ours, truth) < 1.25 * mean_error(eager, truth) < 0.005


def test_a_step_that_overflows_is_skipped() -> None:
    model, optimizer, scaler = scaled_step(2.0**24, torch.float16)
    assert not all(x.isfinite().all() for x in gradients(model).values())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert scaler.get_scale() == 2.0**23


def test_a_step_that_does_not_overflow_is_taken() -> None:
    model, optimizer, scaler = scaled_step(2.0**10, torch.float16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(
        model.state_dict()["pre_heads.2.weight_1"], before["pre_heads.2.weight_1"]
    )
    assert all(x.isfinite().all() for x in model.state_dict().values())


def test_trainer_in_bf16(tmp_path: Path) -> None:
    """Of a step of four micro-batches: no further from float32 than the definition in autocast."""
    model = tiny_llava()
    pre = apply_pre(model, weight=WEIGHT)
    (ours,) = step_gradients(model, tmp_path, 2, 4, bf16=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    remove_pre(model)
    truth = {name: x.clone() for name, x in eager_gradients(pre.heads, make_rows()).items()}
    with torch.autocast("cpu", torch.bfloat16):
        eager = eager_gradients(pre.heads, make_rows())

    assert 0 < mean_error(ours, truth) < 1.25 * mean_error(eager, truth) < 0.05


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two copies, of which the second is read."""
    return x.clone(), x.clone()


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize(
    "hooks",
    (
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda pair: pair[1]),
    ),
    ids=("save_on_cpu", "hooks"),
)
def test_offloaded_activations(hooks: Any, checkpointing: bool) -> None:
    """Saved elsewhere, and brought back: nothing of the tap's goes by identity."""
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model, layers=(1, 3))
    model(**batch).loss.backward()
    expected, figures = gradients(model), pre.metrics()
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with hooks():
        loss = model(**batch).loss
    loss.backward()
    compare(gradients(model), expected)
    assert pre.metrics() == pytest.approx(figures)
