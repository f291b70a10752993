# SPDX-License-Identifier: Apache-2.0
"""Selective activation checkpointing (a `context_fn`) fails in backward: "not found in storage".

It replays the ops of the first run one by one, and PRe's ops differ when a layer is run again.
They are outside of what it sees.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from prereg_kernels import apply_pre
from tests.attached import compare
from tests.tiny import gradients, make_batch, tiny_llava

MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def keep_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


def keep_all(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "two layers": {"layers": (1, 3), "value_in_forward": True},
    "the last layer": {"layers": 4},
    "global": {"level": "global", "layers": (2, 4)},
    "fraction": {"token_fraction": 0.5},
}


@pytest.mark.parametrize("policy", (keep_matmuls, keep_all))
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients(settings: dict[str, Any], policy: Any) -> None:
    figures, steps = [], []
    for selective in (False, True):
        model, batch = tiny_llava(), make_batch((1, 2))
        pre = apply_pre(model, **settings)
        if selective:
            context = partial(create_selective_checkpoint_contexts, policy)
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})
        model(**batch).loss.backward()
        steps.append(gradients(model))
        figures.append(pre.metrics())
    compare(*steps[::-1])
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_other_modes_see_the_ops() -> None:
    """Such as a counter of FLOPs, outside of the checkpoints and in them."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for selective in (False, True):
        model, batch = tiny_llava(), make_batch((1, 2))
        apply_pre(model, value_in_forward=True)
        if selective:
            context = partial(create_selective_checkpoint_contexts, keep_all)
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
