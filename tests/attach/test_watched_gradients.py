# SPDX-License-Identifier: Apache-2.0
"""The gradients of L_LM and L_PRe at a layer, by autograd on states that hooks have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre, eager_pre_loss, remove_pre
from tests.attached import seen
from tests.tiny import IMAGE_TOKEN, gradients, make_batch, tiny_llava

WEIGHT = 3.0


def definition(
    batch: Mapping[str, Any], heads: Mapping[int, Any], weight: float = WEIGHT
) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (what comes to its states at the visual tokens from above, what PRe adds there)}."""
    model = tiny_llava().double()
    with seen(model) as states:
        lm = model(**batch).loss
    mask = batch["input_ids"] == IMAGE_TOKEN
    terms = {
        layer: weight / len(heads) * eager_pre_loss(
            states[layer][mask], states[0][mask], head.weights, head.biases,
            activation=head.activation, upcast=torch.float64,
        )
        for layer, head in heads.items()
    }  # fmt: skip
    found = {}
    for layer, term in terms.items():
        above = lm + sum(terms[higher] for higher in terms if higher > layer)
        pair = [
            torch.autograd.grad(x, states[layer], retain_graph=True)[0][mask] for x in (above, term)
        ]
        found[layer] = (pair[0], pair[1])
    return found


def figures(g: Tensor, p: Tensor, place: str = "") -> dict[str, Any]:
    cosine = (g * p).sum() / g.norm() / p.norm()
    values = {
        "lm_hidden_grad_norm": g.norm(), "pre_hidden_grad_norm": p.norm(),
        "hidden_grad_cosine": cosine,
    }  # fmt: skip
    return {name + place: pytest.approx(x.item(), rel=1e-6) for name, x in values.items()}


def watched(pre: Any) -> dict[str, float]:
    return {name: x for name, x in pre.metrics().items() if "hidden_grad" in name}


def attached(**settings: Any) -> tuple[Any, Any]:
    model = tiny_llava().double()
    pre = apply_pre(model, **{"weight": WEIGHT, **settings})
    pre.watches_gradients = True
    return model, pre


def real(batch: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}


BATCH = real(make_batch((1, 2, 0)))


@pytest.mark.parametrize("checkpointing", (None, False, True))
@pytest.mark.parametrize("gradient", ("auto", "tap"))
def test_one_layer(checkpointing: bool | None, gradient: Any) -> None:
    """Whatever kind of checkpointing there is (True: reentrant), and however the term comes in."""
    model, pre = attached(gradient=gradient)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model(**BATCH).loss.backward()
    [(g, p)] = definition(BATCH, pre.heads).values()
    assert abs((g * p).sum() / g.norm() / p.norm()) > 1e-3
    assert watched(pre) == figures(g, p)


def test_several_layers() -> None:
    """Each has its own; from above the lower one gets what PRe does at the upper one, too."""
    model, pre = attached(layers=(1, 3))
    model(**BATCH).loss.backward()
    expected = definition(BATCH, pre.heads)
    assert watched(pre) == {
        name: x for layer, pair in expected.items()
        for name, x in figures(*pair, f"/layer_{layer}").items()
    }  # fmt: skip


@pytest.mark.parametrize("weight", (0.25, torch.tensor(0.25)))
def test_the_weight_of_a_call(weight: Any) -> None:
    """A number or a tensor; every gradient is that of this weight."""
    model, pre = attached()
    pre.weight = weight
    model(**BATCH).loss.backward()
    [(g, p)] = definition(BATCH, pre.heads, 0.25).values()
    assert watched(pre) == figures(g, p)
    other = tiny_llava().double()
    apply_pre(other, weight=0.25)
    other(**BATCH).loss.backward()
    ours, expected = gradients(model), gradients(other)
    for name, x in expected.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-12)


def test_drawn_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares of four draws that are all tokens together have those of all for their mean."""
    squares = []
    for quarter in range(4):
        monkeypatch.setattr(
            "prereg_kernels.attach.hooks.choose_tokens",
            lambda tokens, *rest, q=quarter: torch.arange(tokens)[q::4],
        )
        model, pre = attached(token_fraction=0.25)
        model(**BATCH).loss.backward()
        f = watched(pre)
        norms = f["lm_hidden_grad_norm"], f["pre_hidden_grad_norm"]
        squares.append(
            [norms[0] ** 2, norms[1] ** 2, norms[0] * norms[1] * f["hidden_grad_cosine"]]
        )
    [(g, p)] = definition(BATCH, pre.heads).values()
    expected = [g.square().sum(), p.square().sum(), (g * p).sum()]
    assert torch.tensor(squares).mean(0).tolist() == pytest.approx(
        [x.item() for x in expected], rel=1e-5
    )


def test_watching_changes_nothing() -> None:
    results = []
    for watches in (False, True):
        model = tiny_llava()
        pre = apply_pre(model)
        pre.watches_gradients = watches
        model(**make_batch()).loss.backward()
        assert bool(watched(pre)) == watches
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_without_visual_tokens_there_are_none() -> None:
    model, pre = attached()
    model(**real(make_batch((0, 0)))).loss.backward()
    assert watched(pre) == {}
    assert pre.metrics()["pre_loss"] == 0


def test_a_weight_of_zero_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise the model's own gradients, zeros for the heads, and no row, of the anchor either."""
    plain = tiny_llava()
    plain(**make_batch()).loss.backward()
    model = tiny_llava()

    def anchor(batch: Mapping[str, Any]) -> Tensor:
        raise AssertionError("it is not asked for")

    pre = apply_pre(model, anchor=anchor, anchor_features=8)
    pre.weight = 0.0
    rows = []
    tap = "prereg_kernels.ops.tap.call_gradients"
    call = __import__("prereg_kernels.ops.tap", fromlist=["tap"]).call_gradients

    def counted(hidden: Tensor, anchor: Tensor, inputs: Any, *rest: Any) -> Any:
        rows.append(inputs.select.numel())
        return call(hidden, anchor, inputs, *rest)

    monkeypatch.setattr(tap, counted)
    model(**make_batch()).loss.backward()
    assert rows == [0]
    expected = gradients(plain)
    for name, x in gradients(model).items():
        assert torch.equal(x, expected.get(name, torch.zeros_like(x))), name
    assert all(p.grad is not None for head in pre.heads.values() for p in head.parameters())
    assert "pre_loss" not in pre.metrics() and pre.metrics()["visual_tokens"] == 8
    pre.weight = 0.5
    with pytest.raises(AssertionError, match="it is not asked for"):
        model(**make_batch())
    remove_pre(model)


@pytest.mark.parametrize("bad", (-1.0, math.inf, "1", torch.ones(2)))
def test_the_weight_is_checked(bad: Any) -> None:
    pre = apply_pre(tiny_llava())
    with pytest.raises(ValueError, match="weight: expected"):
        pre.weight = bad


def test_means_are_not_watched() -> None:
    pre = apply_pre(tiny_llava(), level="global")
    with pytest.raises(ValueError, match="watches_gradients: expected False with level='global'"):
        pre.watches_gradients = True
    with pytest.raises(ValueError, match="watch_steps: expected None with level='global'"):
        pre.config.replace(watch_steps=5)
