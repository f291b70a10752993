# SPDX-License-Identifier: Apache-2.0
"""What PRe once regularised wrongly without a word, as it is now: the right rows, or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import Family, apply_pre
from tests.attach.families.models import IMAGE
from tests.attach.families.test_family import PATCH, PLAIN, PlainModel, plain_batch
from tests.attached import Place, both, compare, eager_term
from tests.models.places import place_of
from tests.models.test_anchors import IMAGES
from tests.models.test_gradients import richest
from tests.releases import here, needs
from tests.zoo import sample

STREAMS = ("gemma3n", "glm5_next", "qwen4_exp")
CODES = {"chameleon": range(51, 59), "emu3": range(50, 58)}


def run(name: str, inputs: Mapping[str, Any], mask: Tensor, **settings: Any) -> Any:
    ours, expected, metrics, (_, term) = both(
        inputs, make=lambda: sample(name).model, mask=mask, place=place_of(name), **settings
    )
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4) and term != 0
    assert metrics["visual_tokens"] == mask.sum()
    return metrics


# Granite 4 Vision: its visual rows are zero as they enter the decoder, and features are added later


def features_of_granite(layer: int) -> Callable[..., Tensor]:
    """The reference's anchor: what its language model is given to add before that layer."""

    def rows(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        given: list[Any] = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        [kwargs] = given
        visual = kwargs["vision_mask"].squeeze(-1)
        assert visual.sum() == 44 and not kwargs["inputs_embeds"][visual].any()
        features: Tensor = kwargs["deepstack_features"][layer]
        return features

    return rows


@needs("granite4_vision")
def test_granite_has_what_the_encoder_delivers_for_an_anchor() -> None:
    batch = sample("granite4_vision").batches["images"]
    run("granite4_vision", batch.inputs, batch.visual, anchor_rows=features_of_granite(0))


@needs("granite4_vision")
def test_granite_given_as_another_family_has_no_anchor() -> None:
    case = sample("granite4_vision")
    family = Family(
        "mine", language_model="model.language_model", layers="model.language_model.layers",
        visual_tokens=("image_token_id",),
    )  # fmt: skip
    apply_pre(case.model, family=family)
    with pytest.raises(ValueError, match=r"all of the 44 visual rows .* are zero, .*enters_at"):
        case.model(**case.batches["images"].inputs)


# Several residual streams, with other levels and anchors


def numbers(inputs: Mapping[str, Any]) -> Tensor:
    """An anchor: eight numbers for each visual token."""
    count = int(torch.isin(inputs["input_ids"], torch.tensor([40, 41])).sum())
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("level", ("patch", "global"))
@pytest.mark.parametrize("anchor", ("pre_llm", numbers))
@pytest.mark.parametrize("name", here(*STREAMS))
def test_the_stream_that_is_read(name: str, anchor: Any, level: str) -> None:
    scene = richest(name)
    batch = sample(name).batches[scene]
    settings: dict[str, Any] = {"level": level, "layers": (1, 3)}
    if anchor is numbers:
        settings |= {"anchor": anchor, "anchor_features": 8}
    if level == "global":
        settings["images"] = IMAGES[name][scene]
    run(name, batch.inputs, batch.visual, **settings)


# Images of families that nobody has looked at


@pytest.mark.parametrize("name, counts", (("mistral3", None), ("vipllava", (16, 16, 16))))
def test_images_are_counted_or_refused(name: str, counts: Any) -> None:
    """Mistral 3 has three images of seven lines in all, VipLLaVA's three follow each other."""
    case = sample(name)
    batch, model = case.batches["images"], case.model
    unknown = Family(
        "mine", language_model="model.language_model", layers="model.language_model.layers",
        visual_tokens=(IMAGE,),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"level: 'global' .* of mine does not say which visual"):
        apply_pre(model, level="global", family=unknown)
    if counts is None:
        with pytest.raises(ValueError, match=r"level: 'global' .* of Mistral 3 does not say"):
            apply_pre(model, level="global")
    else:
        inputs = dict(batch.inputs)
        ids, visual = touching(inputs["input_ids"], batch.visual)
        metrics = run(
            name, inputs | {"input_ids": ids}, visual, level="global", images=counts
        )  # fmt: skip
        assert metrics["images"] == 3


def touching(ids: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """The visual tokens of each row moved to its begin, behind the first token."""
    order = (~visual).long()
    order[:, 0] = -1
    place = order.argsort(dim=1, stable=True)
    return ids.gather(1, place), visual.gather(1, place)


# Encoder-decoders: the encoder's layers are read, even where the labels have the prompt's length


@pytest.mark.parametrize("name", here("florence2", "t5gemma2", "blip-2+t5"))
def test_labels_as_long_as_the_prompt(name: str) -> None:
    batch = sample(name).batches["images"]
    ids = batch.inputs["input_ids"]
    labels = torch.randint(3, 40, ids.shape, generator=torch.Generator().manual_seed(2))
    run(name, batch.inputs | {"labels": labels}, batch.visual)


# Images that are words of the vocabulary already


@pytest.mark.parametrize("name", here(*CODES))
def test_codes_of_images(name: str) -> None:
    """A warning; and where the caller says where they are, the gradients and no word."""
    case = sample(name)
    batch = case.batches["images"]
    codes = torch.tensor(CODES[name])
    drawn = codes[torch.randint(8, batch.visual.shape, generator=torch.Generator().manual_seed(4))]
    inputs = {k: v for k, v in batch.inputs.items() if k not in ("pixel_values", "image_sizes")}
    inputs["input_ids"] = inputs["input_ids"].where(~batch.visual, drawn)
    pre = apply_pre(case.model)
    count = int(batch.visual.sum())
    with pytest.warns(UserWarning, match=f"PRe: {count} ids of the batch are codes of pictures"):
        case.model(**inputs)
    told = sample(name)
    pre = apply_pre(told.model)
    pre.next_visual_mask = batch.visual
    told.model(**inputs).loss.backward()
    assert pre.metrics()["visual_tokens"] == count
    model, heads, figure = case.model, pre.heads, pre.metrics()["pre_loss"]
    _, term = eager_term(model, inputs, heads, batch.visual, place=place_of(name))
    assert figure == pytest.approx(term.item(), rel=1e-4) and term != 0


# One id that the model puts several rows in place of


class Expanding(PlainModel):
    """Three rows for each placeholder; a row of the batch has as many of these as the others."""

    def forward(self, input_ids: Tensor, pixels: Tensor, labels: Tensor) -> SimpleNamespace:
        ids, labels = expanded(input_ids, input_ids), expanded(input_ids, labels)
        return super().forward(ids, pixels, labels)


def expanded(ids: Tensor, values: Tensor) -> Tensor:
    counts = torch.where(ids == PATCH, 3, 1).flatten()
    return values.flatten().repeat_interleave(counts).view(len(ids), -1)


def expanding() -> Expanding:
    torch.manual_seed(0)
    return Expanding()


def batch_of_single_ids() -> dict[str, Tensor]:
    batch = plain_batch()
    ids = batch["input_ids"].where(batch["input_ids"] != PATCH, 11)
    ids[0, 2] = ids[1, 5] = PATCH
    pixels = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    return batch | {"input_ids": ids, "pixels": pixels}


def rows_of_six(inputs: Mapping[str, Any]) -> Tensor:
    return torch.ones(2, 8)


@pytest.mark.parametrize(
    "settings", ({}, {"anchor": rows_of_six, "anchor_features": 8}, {"level": "global"})
)
def test_an_id_of_several_rows(settings: dict[str, Any]) -> None:
    model, batch = expanding(), batch_of_single_ids()
    apply_pre(model, family=dataclasses.replace(PLAIN, images="runs"), **settings)
    with pytest.raises(ValueError, match=r"input_ids: .*\(2, 8\), got inputs_embeds of \(2, 10\)"):
        model(**batch)


def test_an_id_of_several_rows_and_a_mask_of_them() -> None:
    batch = batch_of_single_ids()

    def visual(inputs: Mapping[str, Any]) -> Tensor:
        return expanded(inputs["input_ids"], inputs["input_ids"]) == PATCH

    family = dataclasses.replace(PLAIN, visual_tokens=None, visual_mask=visual)
    ours, expected, metrics, (_, term) = both(
        batch, make=expanding, mask=visual(batch), family=family, place=Place("llm.text")
    )
    compare(ours, expected)
    assert metrics["visual_tokens"] == 6 and metrics["pre_loss"] == pytest.approx(term, rel=1e-4)


# Ids that the advice of an error message left out


def test_videos_beside_a_family_of_images_alone() -> None:
    for scene, count, left_out in (("videos", 0, 80), ("mixed", 12, 80)):
        case = sample("video_llava")
        family = Family(
            "mine", language_model="model.language_model", layers="model.language_model.layers",
            visual_tokens=("image_token_id",),
        )  # fmt: skip
        pre = apply_pre(case.model, family=family)
        with pytest.warns(UserWarning, match=rf"PRe: {left_out} positions .*: 41 \(video_token_i"):
            case.model(**case.batches[scene].inputs).loss.backward()
        assert pre.metrics()["visual_tokens"] == count
