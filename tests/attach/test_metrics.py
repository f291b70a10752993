# SPDX-License-Identifier: Apache-2.0
"""PRe's figures, and what evaluation does to them and to the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, remove_pre
from tests.attached import eager_term
from tests.tiny import PATCHES, make_batch, tiny_llava


def test_evaluation_is_untouched() -> None:
    model, batch = tiny_llava().eval(), make_batch()
    plain = model(**batch)
    pre = apply_pre(model)
    ours = model(**batch)
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.logits, plain.logits)
    assert pre.metrics() == {}
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, plain.loss)


def test_value_in_eval() -> None:
    model, batch = tiny_llava().eval(), make_batch()
    plain = model(**batch).loss
    pre = apply_pre(model, value_in_eval=True)
    loss = model(**batch).loss
    assert torch.equal(loss, plain)
    metrics = pre.metrics()
    heads = pre.heads
    remove_pre(model)
    _, term = eager_term(model, batch, heads)
    assert metrics["pre_loss"] == pytest.approx(term.item(), rel=1e-5)


def test_metrics_of_several_layers() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model, layers=(1, 3))
    assert pre.metrics() == {}
    model(**batch).loss.backward()
    metrics = pre.metrics()
    each = [metrics["pre_loss/layer_1"], metrics["pre_loss/layer_3"]]
    assert metrics["pre_loss"] == pytest.approx(sum(each) / 2)
    assert each[0] != each[1]


@pytest.mark.parametrize("layers", (2, (1, 3)))
def test_no_figure_of_pre_before_backward(layers: Any) -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model, layers=layers)
    loss = model(**batch).loss
    assert pre.metrics() == {"visual_tokens": 2 * PATCHES, "lm_loss": pytest.approx(loss.item())}
    loss.backward()
    assert pre.metrics()["pre_loss"] != 0


def test_no_figure_of_pre_where_backward_reaches_one_layer_of_two() -> None:
    """The mean would take the other's loss for 0."""
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model, layers=(1, 3))
    loss = model(**batch).loss
    torch.autograd.grad(loss, list(pre.heads[3].parameters()), retain_graph=True)
    assert "pre_loss" not in pre.metrics() and pre.totals() is None
    loss.backward()
    assert pre.metrics()["pre_loss/layer_1"] != 0


def test_value_in_forward_has_its_figure_before_backward() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model, value_in_forward=True)
    loss = model(**batch).loss
    before = pre.metrics()
    loss.backward()
    assert before["pre_loss"] != 0
    assert pre.metrics() == before


@pytest.mark.parametrize("no_grad", (False, True))
def test_evaluation_between_forward_and_backward_disturbs_no_figure(no_grad: bool) -> None:
    """By `model.eval()`, and by no_grad alone."""
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model)
    model(**batch).loss.backward()
    expected = pre.metrics()
    loss = model(**batch).loss
    model.train(no_grad)
    with torch.set_grad_enabled(not no_grad):
        model(**make_batch((1, 0, 1), seed=5))
    assert "pre_loss" not in pre.metrics()
    model.train()
    loss.backward()
    assert pre.metrics() == expected


def test_figures_stay_those_of_the_last_training_call() -> None:
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(model)
    model(**batch).loss.backward()
    expected = pre.metrics()
    assert expected["visual_tokens"] == 3 * PATCHES
    model.eval()(**make_batch((1,), seed=5))
    assert pre.metrics() == expected


def test_generation_keeps_the_figure_of_its_prompt() -> None:
    """The calls that follow a prompt's have no visual tokens, and no figure."""
    model, batch = tiny_llava().eval(), make_batch((1, 2))
    pre = apply_pre(model, value_in_eval=True)
    del batch["labels"]
    with torch.no_grad():
        model(**batch)
    expected = pre.metrics()
    assert expected["pre_loss"] != 0
    model(**make_batch((1,), seed=5))
    assert pre.metrics() != expected
    out = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert out.shape[1] == batch["input_ids"].shape[1] + 3
    metrics = pre.metrics()
    assert metrics["visual_tokens"] == 3 * PATCHES
    assert metrics["pre_loss"] == pytest.approx(expected["pre_loss"], rel=1e-5)


def test_evaluation_between_steps() -> None:
    """The denominator is that of a training step; a batch of text alone has figures of its own."""
    model = tiny_llava()
    pre = apply_pre(model, value_in_eval=True)
    model.eval()
    with torch.no_grad():
        model(**make_batch((1, 2)))
        expected = pre.metrics()
        pre.denominator = 7.0
        model(**make_batch((1, 2)))
        assert pre.metrics() == expected and -1 <= expected["pre_loss"] < 0
        text = make_batch((0, 0))
        lm_loss = model(**text).loss
        assert pre.metrics() == {
            "visual_tokens": 0, "lm_loss": pytest.approx(lm_loss.item()), "pre_loss": 0
        }  # fmt: skip


@pytest.mark.parametrize("denominator", (0, torch.tensor(0), torch.tensor(0.0)), ids=repr)
@pytest.mark.parametrize("value_in_forward", (False, True))
def test_a_step_without_visual_tokens(denominator: Any, value_in_forward: bool) -> None:
    """Its count is 0, and so is the term, exactly."""
    model, batch = tiny_llava(), make_batch((0, 0))
    plain = model(**batch).loss
    pre = apply_pre(model, value_in_forward=value_in_forward)
    pre.denominator = denominator
    loss = model(**batch).loss
    assert torch.equal(loss, plain)
    loss.backward()
    for parameter in pre.heads[2].parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() == 0
    ours = {name: p.grad for name, p in model.named_parameters() if "pre_heads" not in name}
    assert pre.metrics()["pre_loss"] == 0
    remove_pre(model)
    model.zero_grad()
    plain.backward()
    compared = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(compared) > 20
    assert all(torch.equal(ours[name], model.get_parameter(name).grad) for name in compared)
