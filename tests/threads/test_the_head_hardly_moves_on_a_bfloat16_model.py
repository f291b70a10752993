# SPDX-License-Identifier: Apache-2.0
"""I fine-tune a bfloat16 model at 1e-5, and after an epoch most of the head is what it was.

The head had the model's dtype, and a step of 1e-5 is less than half of the distance between two
bfloat16 numbers above 1/256. Heads are float32 on such a model, as PEFT's adapters are.
"""

from __future__ import annotations

import pytest
import torch

from prereg_kernels import apply_pre
from tests.tiny import make_batch, tiny_llava


@pytest.mark.parametrize("rate", (1e-5, 2e-5))
def test_every_weight_moves_as_in_float32(rate: float) -> None:
    steps, batch = 10, make_batch((1, 2))
    model = tiny_llava().to(torch.bfloat16)
    head = apply_pre(model).heads[2]
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
    start = [p.detach().clone() for p in head.parameters()]
    exact = [p.detach().double().requires_grad_() for p in head.parameters()]
    followed = torch.optim.AdamW(exact, lr=rate, weight_decay=0.0)  # the same steps in float64
    for _ in range(steps):
        optimizer.zero_grad()
        pixels = batch["pixel_values"].bfloat16()
        model(**batch | {"pixel_values": pixels}).loss.backward()
        for ours, theirs in zip(head.parameters(), exact, strict=True):
            theirs.grad = ours.grad.double()
        optimizer.step()
        followed.step()
    for ours, before, true in zip(head.parameters(), start, exact, strict=True):
        moved = (ours != before).double().mean().item()
        assert moved > 0.98
        step = true - before.double()
        assert torch.linalg.norm(ours - before - step) < 0.01 * torch.linalg.norm(step)
