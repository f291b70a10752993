# SPDX-License-Identifier: Apache-2.0
"""Resumed by `accelerator.load_state`, my run with token_fraction is not the one that I stopped.

The state dict brought the heads back, and not the number of training passes, by which the tokens
are drawn: a resumed run drew those of its first steps again.

The number is part of the model's state. Whatever brings a state dict back goes on with the draws.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from prereg_kernels import apply_pre
from tests.tiny import gradients, make_batch, tiny_llava

STEPS, STOPPED = 4, 2


def steps_of(folder: Path, seed: int, first: int) -> list[dict[str, Tensor]]:
    """The gradients of the steps from `first` on, in an Accelerator of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = tiny_llava(seed)
    apply_pre(model, token_fraction=0.5)  # of the same seed, by which the tokens are drawn
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    if first:
        accelerator.load_state(str(folder))
    found = []
    for step in range(first, STEPS):
        if step == STOPPED and not first:
            accelerator.save_state(str(folder))
        accelerator.backward(model(**make_batch((2, 1), seed=step)).loss)
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_resumed_loop_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = steps_of(tmp_path, 0, 0)
    resumed = steps_of(tmp_path, 5, STOPPED)
    assert len(resumed) == STEPS - STOPPED
    for ours, expected in zip(resumed, whole[STOPPED:], strict=True):
        assert [name for name, x in expected.items() if not torch.equal(ours[name], x)] == []


@pytest.fixture
def fresh_accelerator() -> object:
    """Its state is the process's, as it would be a new one's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
