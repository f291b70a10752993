# SPDX-License-Identifier: Apache-2.0
"""I load a model, attach PRe and train by the README: the heads do not move, the metrics are {}.

`from_pretrained` returns a model in eval mode, in which PRe leaves it alone. Who runs backward
through such a loss is told once, in the first step.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre
from tests.tiny import make_batch, tiny_llava

MESSAGE = "PRe: backward ran through a loss that the model computed in eval mode"


@pytest.mark.parametrize("return_dict", (True, False), ids=("output", "tuple"))
@pytest.mark.parametrize("call", ("model", "forward"))
def test_backward_in_eval_mode(call: str, return_dict: bool) -> None:
    model, batch = tiny_llava().eval(), make_batch()
    apply_pre(model)
    run: Any = partial(model if call == "model" else model.forward, return_dict=return_dict)
    loss = run(**batch)[0]
    with pytest.warns(UserWarning, match=f"{MESSAGE}.*model.train()"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(**batch)[0].backward()
        run(**batch)
        with torch.no_grad():
            run(**batch)
        model.train()
        run(**batch)[0].backward()
    assert model.pre_heads["2"].weight_0.grad.norm() > 0


@pytest.mark.parametrize("return_dict", (True, False), ids=("output", "tuple"))
def test_a_loss_of_ones_own_in_eval_mode_is_no_false_alarm(return_dict: bool) -> None:
    """Such as a saliency map's: without labels the model computes none, and logits come first."""
    model, batch = tiny_llava().eval(), make_batch()
    apply_pre(model)
    del batch["labels"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch, return_dict=return_dict)[0].mean().backward()


def own_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Without labels, as code computes it that has a loss of its own."""
    logits: torch.Tensor = model(**{n: x for n, x in batch.items() if n != "labels"}).logits
    return logits.log_softmax(dim=-1)[..., 5].mean().neg()


def test_a_loss_of_ones_own_in_eval_mode() -> None:
    """Which nothing shows but the heads, that get no gradient in the optimizer's steps."""
    model, batch = tiny_llava().eval(), make_batch()
    pre = apply_pre(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = pre.heads[2].weight_0.clone()

    def step() -> None:
        own_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        step()
        model.train()  # as after an evaluation with grad
        step()
        assert not torch.equal(pre.heads[2].weight_0, before)
        model.eval()
        step()
        step()
    with pytest.warns(UserWarning, match=r"PRe: calls of the model in eval mode.*model\.train\(\)"):
        step()


def test_evaluation_with_grad_is_no_false_alarm() -> None:
    model, batch = tiny_llava().eval(), make_batch()
    apply_pre(model, value_in_eval=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(**batch).loss.requires_grad
