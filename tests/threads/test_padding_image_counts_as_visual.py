# SPDX-License-Identifier: Apache-2.0
"""My trainer appends a white image to every batch of text alone, and PRe trains on it.

Its tokens have attention 0, so they are padding: not visual, in the pass as in `pre.count`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.checkup.features import visual_features
from tests.attach.families.batches import make_batch as family_batch
from tests.attach.families.models import make_model
from tests.attached import anchor_of_pixels, compare, eager_term
from tests.tiny import IMAGE_TOKEN, PATCHES, gradients, make_batch, tiny_llava
from tests.zoo import sample

SETTINGS: dict[str, dict[str, Any]] = {
    "patch": {},
    "global": {"level": "global"},
    "encoder": {"anchor": "pre_projector"},
    "function": {"anchor": anchor_of_pixels, "anchor_features": 8},
    "encoder, global": {"anchor": "pre_projector", "level": "global"},
}


def hide(batch: dict[str, Any], row: int, image: int) -> Tensor:
    """Hide an image from attention; returns where visible visual tokens are."""
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][row, image * PATCHES : (image + 1) * PATCHES] = 0
    return (batch["input_ids"] == IMAGE_TOKEN) & batch["attention_mask"].bool()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_batch_of_text_alone(settings: dict[str, Any]) -> None:
    model, batch = tiny_llava(), make_batch((1, 0))
    hide(batch, 0, 0)
    pre = apply_pre(model, **settings)
    model(**batch).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in pre.heads[2].parameters())
    assert pre.metrics()["visual_tokens"] == pre.count(batch).item() == 0


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_image_among_others(settings: dict[str, Any]) -> None:
    """The second of three; rows of the encoder, or of a function, that are its are left out."""
    model, batch = tiny_llava(), make_batch((2, 1))
    visible = hide(batch, 0, 1)
    pre = apply_pre(model, **settings)
    model(**batch).loss.backward()
    ours, figures, heads = gradients(model), pre.metrics(), pre.heads
    count = pre.count(batch).item()
    model.zero_grad()
    shown = torch.tensor([0, 2])

    def rows(inputs: Any) -> Tensor:
        if settings.get("anchor") == "pre_projector":
            towers = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
            each = towers.hidden_states[model.config.vision_feature_layer][:, 1:]
        else:
            each = anchor_of_pixels(inputs).view(3, PATCHES, -1)
        return each[shown].flatten(0, 1).detach()

    remove_pre(model)
    is_global = settings.get("level") == "global"
    lm, term = eager_term(
        model, batch, heads, visible, anchor=rows if "anchor" in settings else None,
        images=[PATCHES, PATCHES] if is_global else None,
    )  # fmt: skip
    (lm + 0.5 * term).backward()
    expected = gradients(model)
    expected |= {f"pre_heads.2.{n}": p.grad for n, p in heads[2].named_parameters()}
    compare(ours, expected)
    assert count == (2 if is_global else 2 * PATCHES)
    assert figures["visual_tokens"] == 2 * PATCHES
    assert figures["pre_loss"] == pytest.approx(term.item(), rel=1e-5)


@pytest.mark.parametrize("level", ("patch", "global"))
@pytest.mark.parametrize("name", ("llava", "internvl", "gemma3"))
def test_the_count_is_what_the_pass_sees(name: str, level: str) -> None:
    model = make_model(name)
    batch = family_batch(name, model, "several images")
    inputs, visual = dict(batch.inputs), batch.visual
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    first = visual[0].nonzero()[0]
    inputs["attention_mask"][0, first] = 0
    pre = apply_pre(model, level=level)
    model(**inputs).loss.backward()
    metrics = pre.metrics()
    assert metrics["visual_tokens"] == visual.sum().item() - 1
    assert pre.count(inputs).item() == metrics["images" if level == "global" else "visual_tokens"]


def as_bool(mask: Tensor) -> Tensor:
    """(rows, 1, queries, keys), causal."""
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal & mask[:, None, None, :].bool()


def as_scores(mask: Tensor, hidden: float = torch.finfo().min) -> Tensor:
    return torch.zeros(as_bool(mask).shape).masked_fill(~as_bool(mask), hidden)


FORMS = {
    "int": lambda mask: mask,
    "bool": lambda mask: mask.bool(),
    "numbers of packed samples": lambda mask: mask * 3,
    "float": lambda mask: mask.float(),
    "four dimensions, bool": as_bool,
    "four dimensions, added to the scores": as_scores,
    "added to the scores, -1e9": partial(as_scores, hidden=-1e9),
    "added to the scores, -1e4": partial(as_scores, hidden=-1e4),
    "added to the scores, bfloat16": lambda mask: as_scores(mask, -1e4).bfloat16(),
    "a mapping": lambda mask: {"full_attention": as_bool(mask), "sliding_attention": None},
    "longer, with a cache": lambda mask: torch.cat([torch.ones(2, 3), mask], dim=1),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_masks_of_any_form(form: Any) -> None:
    batch = make_batch((2, 1))
    visible = hide(batch, 0, 1)
    pre = apply_pre(tiny_llava())
    mask = form(batch["attention_mask"])
    assert torch.equal(pre.visual_mask(batch["input_ids"], mask), visible)
    assert pre.count(batch | {"attention_mask": mask}).item() == 2 * PATCHES


SILENT = {"none": None, "short": torch.ones(2, 3), "rows": torch.ones(3, 14), "other": object()}


@pytest.mark.parametrize("mask", SILENT.values(), ids=SILENT)
def test_masks_that_say_nothing(mask: Any) -> None:
    batch = make_batch((2, 1))
    pre = apply_pre(tiny_llava())
    assert pre.visual_mask(batch["input_ids"], mask).sum() == 3 * PATCHES


def test_the_checkup_leaves_them_out() -> None:
    model, batch = tiny_llava().eval(), make_batch((2, 1))
    del batch["labels"]
    visible = hide(batch, 0, 1)
    layers = visual_features(model, batch)
    assert [len(rows) for rows in layers] == [visible.sum()] * 5


def test_a_mask_function_leaves_them_out() -> None:
    """Kosmos-2's, which looks at attention itself: PRe takes its word."""
    case = sample("kosmos-2")
    batch = case.batches["images"]
    pre = apply_pre(case.model)
    hidden = batch.visual.flatten().nonzero()[0]
    attention = torch.ones_like(batch.inputs["input_ids"])
    attention.view(-1)[hidden] = 0
    case.model(**batch.inputs | {"attention_mask": attention}).loss.backward()
    seen = pre.count(batch.inputs | {"attention_mask": attention}).item()
    assert pre.metrics()["visual_tokens"] == seen == batch.visual.sum() - 1
