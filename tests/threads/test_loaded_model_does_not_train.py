"""I load a model, attach PRe and train by the README: the heads do not move, the metrics are {}.

`from_pretrained` returns a model in eval mode, in which PRe leaves it alone. Who runs backward
through such a loss is told once, in the first step.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre
from tests.tiny import make_batch, tiny_llava

MESSAGE = "PRe: backward ran through a loss that the model computed in eval mode"


@pytest.mark.parametrize("call", ("model", "forward"))
def test_backward_in_eval_mode(call: str) -> None:
    model, batch = tiny_llava().eval(), make_batch()
    apply_pre(model)
    run: Any = model if call == "model" else model.forward
    loss = run(**batch).loss
    with pytest.warns(UserWarning, match=f"{MESSAGE}.*model.train()"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(**batch).loss.backward()
        run(**batch)
        with torch.no_grad():
            run(**batch)
        model.train()
        run(**batch).loss.backward()
    assert model.pre_heads["2"].weight_0.grad.norm() > 0


def test_evaluation_with_grad_is_no_false_alarm() -> None:
    model, batch = tiny_llava().eval(), make_batch()
    apply_pre(model, value_in_eval=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(**batch).loss.requires_grad
