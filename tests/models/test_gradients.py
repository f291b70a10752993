# SPDX-License-Identifier: Apache-2.0
"""`apply_pre(model)` and nothing else, on every image-text model: the gradients of the definition.

The states of the reference come from hooks of its own, at places that are written down by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, remove_pre
from tests.attach.families.models import LAYERS
from tests.attached import both, compare
from tests.models.places import TRAINED, place_of
from tests.zoo import sample

# Their forward takes no batch without pixels.
NEEDS_IMAGES = (
    "blip-2", "blip-2+t5", "instructblip", "instructblip+llama", "instructblipvideo", "kosmos-2",
)  # fmt: skip
every_model = pytest.mark.parametrize("name", TRAINED)
checkpointed = pytest.mark.parametrize(
    "checkpointing", (False, True), ids=("plain", "checkpointed")
)


def check(name: str, scene: str, checkpointing: bool, **settings: Any) -> None:
    """Every gradient of the model and of the heads, and the figures."""
    batch = sample(name).batches[scene]
    ours, expected, metrics, (lm, term) = both(
        batch.inputs, make=lambda: sample(name).model, mask=batch.visual,
        checkpointing=checkpointing, place=place_of(name), **settings,
    )  # fmt: skip
    compare(ours, expected)
    assert metrics["visual_tokens"] == batch.visual.sum()
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7)
    assert metrics["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert (term == 0) == (scene == "text only")


def richest(name: str) -> str:
    """The scene with all that the model takes."""
    return next(s for s in ("mixed", "images", "videos") if s in sample(name).batches)


@every_model
def test_gradients(name: str) -> None:
    check(name, richest(name), checkpointing=True)


@every_model
@pytest.mark.matrix
@checkpointed
def test_gradients_of_every_scene(name: str, checkpointing: bool) -> None:
    for scene in sample(name).batches:
        check(name, scene, checkpointing)


@every_model
@pytest.mark.matrix
@checkpointed
def test_gradients_of_several_layers(name: str, checkpointing: bool) -> None:
    check(name, richest(name), checkpointing, layers=(1, LAYERS - 1))


@every_model
@pytest.mark.matrix
def test_gradients_of_all_layers(name: str) -> None:
    check(name, richest(name), False, layers=tuple(range(1, LAYERS + 1)))


@pytest.mark.parametrize("name", [n for n in TRAINED if n not in NEEDS_IMAGES])
def test_text_alone_has_no_term(name: str) -> None:
    """The heads get zeros, and nobody is told of anything."""
    case = sample(name)
    pre = apply_pre(case.model)
    case.model(**case.batches["text only"].inputs).loss.backward()
    assert pre.metrics()["visual_tokens"] == pre.metrics()["pre_loss"] == 0
    for head in pre.heads.values():
        assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@every_model
@pytest.mark.matrix
def test_removed_it_leaves_nothing(name: str) -> None:
    case = sample(name)
    model, inputs = case.model, case.batches[richest(name)].inputs
    names = list(model.state_dict())
    model(**inputs)  # some put hooks of their own on their towers then
    before = hooks_of(model)
    losses, gradients = [], []
    for attached in (False, True, False):
        if attached:
            apply_pre(model, weight=0.0)
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        if attached:
            remove_pre(model)
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert list(model.state_dict()) == names
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    assert gradients[0].keys() == gradients[2].keys()
    for n, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[2][n]), n
    assert hooks_of(model) == before


def hooks_of(model: Any) -> dict[str, tuple[int, int]]:
    """How many each of its modules has."""
    return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


@every_model
@pytest.mark.matrix
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """The model without PRe's parameters, the heads beside it."""
    case, other = sample(name), sample(name).model
    pre = apply_pre(case.model)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    case.model(**case.batches[richest(name)].inputs).loss.backward()
    optimizer.step()
    pre.save(tmp_path)
    loaded = apply_pre(other, from_pretrained=tmp_path)
    assert loaded.config.layers == tuple(pre.heads)
    for ours, theirs in zip(loaded.heads.values(), pre.heads.values(), strict=True):
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, its)
