# SPDX-License-Identifier: Apache-2.0
"""My loop skips batches that raise, and PRe leaves out the one after each of them.

`model.forward(...)`, which goes past the model's hooks, left a call that PRe took for the next. So
did Ctrl-C in a call of the part of the model that takes `input_ids`, whose next call then had the
positions of the interrupted batch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre
from tests.tiny import make_batch, tiny_llava


def head_gradient(model: Any, call: Any, batch: dict[str, Any]) -> Tensor:
    model.zero_grad()
    output = call(**batch)
    loss = output.loss if hasattr(output, "loss") else output.last_hidden_state.pow(2).mean()
    loss.backward()
    gradient: Tensor = model.pre_heads["2"].weight_0.grad
    return gradient.clone()


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in batch.items() if name != "labels"}


@pytest.mark.parametrize("name", ("model", "forward"))
def test_after_an_error(name: str) -> None:
    model, good, bad = tiny_llava(), make_batch((1, 1)), make_batch((2,))
    apply_pre(model, level="global")
    bad["input_ids"][0, 7] = 5  # as where truncation cuts a visual token
    call = model if name == "model" else model.forward
    expected = head_gradient(model, call, good)
    assert expected.norm() > 0
    for _ in range(2):
        with pytest.raises(ValueError, match="level"):
            call(**bad)
        assert torch.equal(head_gradient(model, call, good), expected)
    with pytest.raises(ValueError, match="level"):
        call(**bad)
    inner = head_gradient(model, model.model, without_labels(good))
    apply_pre(fresh := tiny_llava(), level="global")
    assert torch.equal(inner, head_gradient(fresh, fresh.model, without_labels(good)))


def test_after_an_interrupt() -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    model = tiny_llava()
    pre = apply_pre(model)
    before, after = (without_labels(make_batch((1, 1), seed=seed)) for seed in (0, 3))
    after["input_ids"] = after["input_ids"].flip(1)  # visual tokens at other positions
    expected = head_gradient(model, model.model, after), pre.metrics()
    hook = model.model.language_model.layers[0].register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model.model(**before)
    hook.remove()
    assert torch.equal(head_gradient(model, model.model, after), expected[0])
    assert pre.metrics() == expected[1]
