# SPDX-License-Identifier: Apache-2.0
"""Anchors, levels and fractions on every family; packed sequences."""

from __future__ import annotations

import inspect
import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre
from prereg_kernels.attach.families import family_of_type
from prereg_kernels.attach.sampling import choose_tokens
from tests.attach.families.batches import Batch, has, make_batch
from tests.attach.families.models import CASES, make_model
from tests.attach.families.packing import pack
from tests.attach.families.test_models import FAMILY_SCENES, checkpointed, every_family
from tests.attach.test_regularizer import traces
from tests.attached import both, compare
from tests.encoder_rows import SOURCES, encoder_rows, tower_rows, window_index
from tests.releases import HERE

JOINED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3")
PROJECTED = tuple(name for name in CASES if family_of_type(name).projector)
TELLING = tuple(name for name in CASES if family_of_type(name).images)
EQUAL = ("llava", "paligemma")  # a row of `pixel_values` is an image of theirs


def run(name: str, batch: Batch, **options: Any) -> Any:
    return both(batch.inputs, make=lambda: make_model(name), mask=batch.visual, **options)


# anchor="pre_projector"


def test_rows_of_one_call_are_not_copied() -> None:
    """What enters the merger is its input, and autograd keeps it anyway if the merger trains."""
    model, seen = make_model("qwen3_vl"), dict[str, Tensor]()
    pre = apply_pre(model, anchor="pre_projector")
    family_of_type("qwen3_vl").projector_of(model).register_forward_pre_hook(
        lambda module, args: seen.update(entered=args[0])
    )
    [head] = pre.heads.values()
    head.register_forward_pre_hook(lambda head, args: seen.update(anchor=args[1]))
    model(**make_batch("qwen3_vl", model, "images").inputs)
    assert seen["anchor"].data_ptr() == seen["entered"].data_ptr()
    assert seen["anchor"].numel() == seen["entered"].numel()


@checkpointed
@pytest.mark.parametrize("name, scene", [x for x in FAMILY_SCENES if x[0] in PROJECTED])
def test_gradients_with_what_the_encoder_saw(name: str, scene: str, checkpointing: bool) -> None:
    batch = make_batch(name, make_model(name), scene)
    width = 64 if name in JOINED else 16  # the encoder's, for each patch of a token or once
    rows = partial(encoder_rows, width=width) if name in SOURCES else tower_rows
    ours, expected, metrics, (_, term) = run(
        name, batch, checkpointing=checkpointing, anchor="pre_projector", anchor_rows=rows,
        layers=(1, 2),
    )  # fmt: skip
    assert ours["pre_heads.2.weight_1"].shape == (width, 32)
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7)
    assert (term == 0) == (scene == "text only")


@pytest.mark.parametrize(
    "settings, width",
    (
        ({"vision_feature_select_strategy": "full"}, 16),
        ({"vision_feature_layer": -1}, 16),
        ({"vision_feature_layer": [0, 2]}, 32),
    ),
)
def test_the_features_that_llava_selects(settings: dict[str, Any], width: int) -> None:
    case = CASES["llava"]
    config = case.config()
    for name, value in settings.items():
        setattr(config, name, value)

    def make() -> Any:
        torch.manual_seed(0)
        return case.model(config).train()

    batch = make_batch("llava", make())
    ours, expected, _, _ = both(
        batch.inputs, make=make, mask=batch.visual, anchor="pre_projector",
        anchor_rows=tower_rows,
    )  # fmt: skip
    assert ours["pre_heads.2.weight_1"].shape == (width, 32)
    compare(ours, expected)


@pytest.mark.parametrize("name", [name for name in CASES if name not in PROJECTED])
def test_families_whose_encoder_has_other_rows(name: str) -> None:
    model = make_model(name)
    before = traces(model)
    family = family_of_type(name)
    with pytest.raises(
        ValueError, match=f"anchor: 'pre_projector' .*{family.name} {family.regroups}"
    ):
        apply_pre(model, anchor="pre_projector")
    assert traces(model) == before


# level="global"


@checkpointed
@pytest.mark.parametrize("name, scene", [x for x in FAMILY_SCENES if x[0] in TELLING])
def test_gradients_of_whole_images(name: str, scene: str, checkpointing: bool) -> None:
    batch = make_batch(name, make_model(name), scene)
    ours, expected, metrics, (_, term) = run(
        name, batch, checkpointing=checkpointing, level="global", images=batch.images,
        layers=(1, 2),
    )  # fmt: skip
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7)
    assert metrics["images"] == len(batch.images)
    assert metrics["visual_tokens"] == sum(batch.images)
    model = make_model(name)
    count = apply_pre(model, level="global").count(batch.inputs)
    assert count.item() == len(batch.images) and count.dtype == torch.int64


COUNTED = [name for name in TELLING if name not in (*EQUAL, "internvl")]


@pytest.mark.parametrize("name", COUNTED)
def test_images_that_touch(name: str) -> None:
    """No chat template writes them so, a text of the user's may: they are not one image."""
    model = make_model(name)
    batch = make_batch(name, model)
    ids, visual = batch.inputs["input_ids"][0], batch.visual[0]
    first, last = visual.nonzero()[[0, -1], 0].tolist()
    part, among = ids[first : last + 1], visual[first : last + 1]
    assert (~among).sum() == 3
    part.copy_(torch.cat((part[among], part[~among])))
    apply_pre(model, level="global")
    with pytest.raises(ValueError, match="got 2 runs of them for 3 images"):
        model(**batch.inputs)


def test_internvl_has_a_token_around_every_image() -> None:
    """So that its images, which the batch does not count, cannot touch."""
    from transformers import InternVLProcessor

    words = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="x", image_seq_length=2
    )
    if HERE >= (5, 16):
        text = InternVLProcessor.replace_image_token(words, {"num_patches": [1, 3]}, 1)
    else:
        words.video_token = "<video>"
        insert = InternVLProcessor._insert_media_placeholders
        [text], *_ = insert(words, ["x"], [0] * 3, [], [3], [], [3], [], [])
    assert text == "<img>xxxxxx</img>"


@pytest.mark.parametrize("name", [name for name in CASES if name not in TELLING])
def test_families_whose_batches_do_not_tell_images_apart(name: str) -> None:
    model = make_model(name)
    before = traces(model)
    with pytest.raises(ValueError, match=r"level: 'global' .* SmolVLM and Idefics3 does not say"):
        apply_pre(model, level="global")
    assert traces(model) == before


# token_fraction


@checkpointed
@every_family
def test_gradients_of_a_fraction(name: str, checkpointing: bool) -> None:
    """Those of the mean over the tokens of the first draw."""
    batch = make_batch(name, make_model(name))
    tokens = len(batch.features)
    chosen = choose_tokens(tokens, 0.4, (3, 0, 0), torch.device("cpu"))
    assert len(chosen) == round(0.4 * tokens)
    ours, expected, metrics, (_, term) = run(
        name, batch, checkpointing=checkpointing, token_fraction=0.4, seed=3, chosen=chosen,
        layers=(1, 2),
    )  # fmt: skip
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4)
    assert metrics["visual_tokens"] == tokens


# Packed sequences


@checkpointed
@every_family
def test_gradients_of_packed_sequences(name: str, checkpointing: bool) -> None:
    """And that these are packed: L_PRe is what it is of the rows by themselves."""
    model = make_model(name)
    batch = make_batch(name, model, "uneven images" if has(name, "uneven images") else "images")
    packed = pack(model, batch)
    ours, expected, metrics, (_, term) = run(name, packed, checkpointing=checkpointing)
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4)
    if name == "paligemma":  # transformers lets the prefixes of a row see each other
        return
    apart = apply_pre(model)
    model(**batch.inputs).loss.backward()
    assert metrics["pre_loss"] == pytest.approx(apart.metrics()["pre_loss"], rel=1e-4)


# Generation and bad batches


GENERATED = [
    (name, settings)
    for name in CASES
    for settings in ({"anchor": "pre_projector"}, {"level": "global"})
    if name in (PROJECTED if "anchor" in settings else TELLING)
]


@pytest.mark.parametrize("name, settings", GENERATED)
def test_generate(name: str, settings: dict[str, Any]) -> None:
    """The prompt has a figure, the tokens that follow it have none; they are what they were.

    From transformers 5.24 on the prompt's images are encoded before its call, which has none then.
    """
    model = make_model(name).eval()
    is_encoded_before = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    inputs = make_batch(name, model, "left padding").inputs
    del inputs["labels"]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    plain = model.generate(**inputs, **options)
    pre = apply_pre(model, value_in_eval=True, **settings)
    assert torch.equal(model.generate(**inputs, **options), plain)
    assert ("pre_loss" in pre.metrics()) != is_encoded_before
    model(**inputs)
    assert pre.metrics()["pre_loss"] != 0


# Idefics 3's forward does not look: it takes as many features as there are tokens.
@pytest.mark.parametrize("name", [name for name in CASES if name != "idefics3"])
def test_visual_tokens_that_are_not_those_of_the_features(name: str) -> None:
    """One too few: an error of transformers', and nothing stays behind."""
    model = make_model(name)
    batch = make_batch(name, model)
    pre = apply_pre(model)
    model(**batch.inputs).loss.backward()
    expected = pre.metrics()
    ids = batch.inputs["input_ids"].clone()
    ids.view(-1)[batch.visual.flatten().nonzero()[0]] = 5
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        model(**batch.inputs | {"input_ids": ids})
    model(**batch.inputs).loss.backward()
    assert pre.metrics() == expected


def test_places_of_windows() -> None:
    """As transformers has them, of images and videos of many sizes."""
    model, numbers = make_model("qwen2_5_vl"), random.Random(0)
    family = family_of_type("qwen2_5_vl")
    moved = 0
    for _ in range(40):
        sizes = [[numbers.randint(1, 3), *(2 * numbers.randint(1, 9) for _ in "hw")] for _ in "abc"]
        grids = torch.tensor(sizes)
        batch = {"image_grid_thw": grids[:2], "video_grid_thw": grids[2:]}
        places = family.places(model.config, batch)
        assert torch.equal(places, window_index(model.model.visual, grids))
        moved += int((places != torch.arange(len(places))).sum())
        alone = family.places(model.config, {"image_grid_thw": None, "video_grid_thw": grids})
        assert torch.equal(alone, places)
    assert moved > 1000
