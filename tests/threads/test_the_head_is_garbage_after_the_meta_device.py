# SPDX-License-Identifier: Apache-2.0
"""I build the model on the meta device, attach PRe, load my checkpoint: L_PRe is 0 or NaN.

A plain checkpoint has no heads. With strict=False nobody filled them, and `to_empty` left whatever
was in memory, numbers of 1e16 among it. The heads are those of a model that was never on the meta
device, and so is L_PRe.
"""

from __future__ import annotations

import pytest
import torch

from prereg_kernels import apply_pre, eager_pre_loss
from tests.attached import seen
from tests.tiny import IMAGE_TOKEN, make_batch, tiny_llava


@pytest.mark.parametrize("assign", (False, True))
def test_the_loss_is_that_of_a_model_that_was_never_there(assign: bool) -> None:
    plain, batch = tiny_llava(), make_batch()
    with torch.device("meta"):
        model = tiny_llava()
    pre = apply_pre(model)
    if not assign:
        with torch.no_grad():
            for parameter in model.to_empty(device="cpu").model.parameters():
                parameter.fill_(1e16)
    model.load_state_dict(plain.state_dict(), strict=False, assign=assign)
    for name, buffer in plain.named_buffers():  # which no checkpoint has
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent).register_buffer(last, buffer, persistent=False)
    model(**batch).loss.backward()
    with seen(plain) as states, torch.no_grad():
        plain(**batch)
    mask = batch["input_ids"] == IMAGE_TOKEN
    torch.manual_seed(0)
    matrices = [torch.nn.Linear(24, 24) for _ in range(2)]
    weights, biases = [x.weight for x in matrices], [x.bias for x in matrices]
    expected = eager_pre_loss(states[2][mask], states[0][mask], weights, biases)
    assert pre.metrics()["pre_loss"] == pytest.approx(expected.item(), rel=1e-5)
