# SPDX-License-Identifier: Apache-2.0
"""A family with one fact wrong ends in an error or a warning, or in the right figures.

Each resolved family is given again with one fact changed, and the case's batch trains with it.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from prereg_kernels import apply_pre
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.resolver import resolve
from tests.attach.families.models import NEW, VIDEO
from tests.models.places import TRAINED
from tests.models.test_gradients import every_model, richest
from tests.releases import here
from tests.zoo import sample
from tests.zoo.parts import AUDIO

BEGIN, PAD = 1, 0  # the first token of each row, and what pads it
PLAIN = r"of the \d+ visual positions .* without visual features"
LEFT_OUT = "positions of the batch get features and are not counted as visual tokens"
NOT_VISUAL = "expected none of the ids of other tokens with features"
BY_TYPE = "are visual by the family of"  # where the rows of its words are not those of the table
OUTSIDE = r"family\.layers: expected a list of layers inside of "
IN_A_LAYER = r"family\.layers: expected the list of layers, as "
LATER = r"family\.enters_at: expected .* they are there before"
ZERO = "are zero, and so would L_PRe be"


class Outcome(NamedTuple):
    """What a user sees: an error or a warning; and the figures, where there is no error."""

    words: str
    figures: tuple[float, float] | None


def outcome(name: str, scene: str, family: Family, **settings: Any) -> Outcome:
    """Of a training step."""
    case = sample(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            pre = apply_pre(case.model, family=family, **settings)
            case.model(**case.batches[scene].inputs).loss.backward()
        except (ValueError, RuntimeError) as error:
            return Outcome(str(error), None)
    metrics = pre.metrics()
    words = "\n".join(str(w.message) for w in caught if str(w.message).startswith("PRe: "))
    return Outcome(words, (metrics["visual_tokens"], metrics["pre_loss"]))


def says(words: str, *rules: str) -> bool:
    return any(re.search(rule, words, re.DOTALL) for rule in rules)


def family_of(name: str) -> Family:
    return resolve(sample(name).model).family


def with_tokens(family: Family, *tokens: int | str) -> Family:
    return dataclasses.replace(family, visual_tokens=tokens, visual_mask=None)


def scenes_of(name: str) -> list[str]:
    return [scene for scene in sample(name).batches if scene != "text only"]


def token_of(wrong: int | str, name: str, scene: str) -> int:
    return int(sample(name).batches[scene].inputs["input_ids"][0, 1]) if wrong == "word" else wrong


# Each kind of model; the others are for the long run
KINDS = (
    "llava", "qwen3_vl", "gemma3n", "granite4_vision", "kosmos-2", "inkling_mm_model", "blip-2",
    "florence2", "chameleon", "gemma3", "ovis2",
)  # fmt: skip
each_kind = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.matrix) for n in TRAINED]
)
every_wrong_id = pytest.mark.parametrize("wrong", ("word", BEGIN, NEW, PAD, AUDIO))


# Ids


@each_kind
def test_given_again_it_is_right(name: str) -> None:
    """What follows is due to the one fact."""
    scene = richest(name)
    words, figures = outcome(name, scene, family_of(name))
    assert words == "" and figures is not None
    assert figures[0] == sample(name).batches[scene].visual.sum() and figures[1] != 0


def shown_ids(name: str, scene: str) -> list[int]:
    inputs = sample(name).batches[scene].inputs
    ids: list[int] = inputs["input_ids"][inputs["attention_mask"] == 1].tolist()
    return ids


def check_wrong_id(name: str, scene: str, token: int) -> None:
    """Rows of words are plain, and those of the right id are left out."""
    family = family_of(name)
    words, _ = outcome(name, scene, with_tokens(family, token))
    if token in family.other_token_ids(sample(name).model):
        assert says(words, NOT_VISUAL), words
    elif token not in shown_ids(name, scene):
        assert says(words, LEFT_OUT, BY_TYPE), words
    else:
        assert says(words, PLAIN, BY_TYPE), words


@every_model
def test_the_id_of_a_word(name: str) -> None:
    check_wrong_id(name, richest(name), BEGIN)


@every_model
@every_wrong_id
@pytest.mark.matrix
def test_a_wrong_id(name: str, wrong: int | str) -> None:
    for scene in scenes_of(name):
        check_wrong_id(name, scene, token_of(wrong, name, scene))


@every_model
@every_wrong_id
@pytest.mark.matrix
def test_an_id_too_many(name: str, wrong: int | str) -> None:
    """It is told of; or it is nowhere, and all is right."""
    family = family_of(name)
    others = family.other_token_ids(sample(name).model)
    for scene in scenes_of(name):
        batch, token = sample(name).batches[scene], token_of(wrong, name, scene)
        ids, shown = batch.inputs["input_ids"], batch.inputs["attention_mask"] == 1
        right = ids[batch.visual].unique().tolist()
        result = outcome(name, scene, with_tokens(family, *right, token))
        if token in ids[shown] or token in others:
            assert says(result.words, PLAIN, NOT_VISUAL, BY_TYPE), (scene, result)
        else:
            assert result == outcome(name, scene, family), scene


def ids_by_name(name: str) -> dict[int | str, int]:
    family, model = family_of(name), sample(name).model
    return {
        t: with_tokens(family, t).visual_token_ids(model)[0] for t in family.visual_tokens or ()
    }


@every_model
def test_an_id_left_out(name: str) -> None:
    """Of a batch of videos, where nothing is visual then, and of one with images too."""
    ids = ids_by_name(name)
    if VIDEO not in ids.values():
        return
    [missing] = [token for token, id in ids.items() if id == VIDEO]
    rest = [token for token in ids if token != missing]
    for scene in scenes_of(name):
        batch = sample(name).batches[scene]
        visual = batch.inputs["input_ids"][batch.visual]
        count = int((visual == VIDEO).sum())
        words, figures = outcome(name, scene, with_tokens(family_of(name), *rest or (AUDIO + 5,)))
        assert figures is not None and figures[0] == len(visual) - count
        if count:
            assert says(words, f"{count} {LEFT_OUT}; their ids: {VIDEO} \\(video_token_i"), words
        else:
            assert words == ""


@each_kind
@pytest.mark.parametrize("step", (1, -1))
def test_a_mask_that_is_a_position_off(name: str, step: int) -> None:
    batch = sample(name).batches[richest(name)]
    shifted = batch.visual.roll(step, dims=1)
    family = dataclasses.replace(
        family_of(name), visual_tokens=None, visual_mask=lambda inputs: shifted
    )
    words, _ = outcome(name, richest(name), family)
    if name in ("gemma3n", "ovis2"):  # the tokens around an image have features, too
        assert says(words, PLAIN, LEFT_OUT), words
    else:
        assert says(words, f"^visual_(tokens|mask): {PLAIN}", BY_TYPE), words


# Layers


def lists_of(model: nn.Module, but: str | None) -> list[str]:
    """Paths of its lists of modules."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n != but and m]


@every_model
def test_lists_of_other_parts(name: str) -> None:
    """As of the tower, or of the decoder beside the encoder that reads images."""
    model, family = sample(name).model, family_of(name)
    inside = f"{family.language_model}."
    for path in lists_of(model, family.layers):
        if not path.startswith(inside):
            with pytest.raises(ValueError, match=OUTSIDE):
                apply_pre(model, family=dataclasses.replace(family, layers=path))


@every_model
@pytest.mark.matrix
def test_lists_within_the_language_model(name: str) -> None:
    family = family_of(name)
    for path in lists_of(sample(name).model, family.layers):
        words, _ = outcome(name, richest(name), dataclasses.replace(family, layers=path), layers=1)
        assert words, path
        if path.startswith(f"{family.layers}."):
            assert says(words, IN_A_LAYER), words


@pytest.mark.parametrize("name", here("blip-2+t5", "florence2", "t5gemma2"))
def test_the_decoder_of_an_encoder_decoder(name: str) -> None:
    """Also where the labels are as long as the prompt."""
    model, family = sample(name).model, family_of(name)
    assert family.layers is not None and ".encoder" in family.layers
    language_model, _, layers = (
        family.layers.replace("encoder", "decoder").replace(".text_model", "").rpartition(".")
    )
    wrong = dataclasses.replace(
        family, language_model=language_model, layers=f"{language_model}.{layers}"
    )
    with pytest.raises(ValueError, match=f"{OUTSIDE}the encoder, .* which reads images"):
        apply_pre(model, family=wrong)


@every_model
@pytest.mark.matrix
def test_another_language_model(name: str) -> None:
    """An error, or the one around it gets the same embeddings."""
    model, family, scene = sample(name).model, family_of(name), richest(name)
    right = outcome(name, scene, family)
    for path, module in model.named_modules():
        if path and path.count(".") < 4 and path != family.language_model and [*module.children()]:
            changed = dataclasses.replace(family, language_model=path)
            result = outcome(name, scene, changed)
            if f"{family.layers}.".startswith(f"{path}."):
                assert result.words or result == right, path
            else:
                assert says(result.words, OUTSIDE), path


@each_kind
def test_the_model_around_the_language_model(name: str) -> None:
    family, scene = family_of(name), richest(name)
    path, _, _ = str(family.language_model).rpartition(".")
    if not path:
        return
    result = outcome(name, scene, dataclasses.replace(family, language_model=path))
    if result != outcome(name, scene, family):
        assert says(result.words, r"family\.language_model(: expected| to be) the module that"), (
            result
        )


# Where features enter


@each_kind
def test_features_that_enter_before(name: str) -> None:
    family, model = family_of(name), sample(name).model
    later = (family.entry_of(model) or 0) + 1
    wrong = dataclasses.replace(family, enters_at=later)
    assert says(outcome(name, richest(name), wrong, layers=3).words, LATER)


@every_model
@pytest.mark.matrix
def test_features_that_enter_elsewhere(name: str) -> None:
    """Said to enter at the first layer, or with the embeddings."""
    family, model, scene = family_of(name), sample(name).model, richest(name)
    entry = family.entry_of(model)
    other = 0 if entry is None else None
    result = outcome(name, scene, dataclasses.replace(family, enters_at=other))
    if entry is None:
        assert says(result.words, LATER), result
    elif name == "granite4_vision":
        assert says(result.words, ZERO), result
    else:  # their language model gets no embeddings, so the first layer's input is the anchor
        assert result == outcome(name, scene, family)


# Streams


@pytest.mark.parametrize("name", here("gemma3n", "glm5_next", "qwen4_exp"))
def test_streams(name: str) -> None:
    """Their layers' output is several streams; no stream is chosen, or rows in place of one."""
    family = family_of(name)
    assert family.streams is not None

    def first(output: Tensor, width: int) -> Tensor:
        return output[0]

    for scene in scenes_of(name):
        right = outcome(name, scene, family)
        assert right.words == ""
        for streams in (None, first):
            for settings in (
                {},
                {"level": "global"},
                {"anchor": anchor_of_ones, "anchor_features": 32},
            ):
                wrong = dataclasses.replace(family, streams=streams)
                result = outcome(name, scene, wrong, **settings)
                if name == "gemma3n" and streams is first:  # that is the one
                    assert result.words == ""
                else:
                    assert says(result.words, r"family\.streams: layer 2, a \w+, returns"), result


def anchor_of_ones(inputs: dict[str, Any]) -> Tensor:
    return torch.ones(int(torch.isin(inputs["input_ids"], torch.tensor([40, 41])).sum()), 32)
