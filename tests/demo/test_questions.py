# SPDX-License-Identifier: Apache-2.0
"""Questions: the answers against an independent recount, and the mix."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from prereg_kernels.demo.data.questions import (
    BIASED_PRESENCE,
    COMMON_FAMILIES,
    FAMILIES,
    Question,
    cell_names,
    questions,
    words,
)
from prereg_kernels.demo.data.scenes import ATTRIBUTES, Scene, SceneConfig, Scenes


def _recount(scene: Scene, question: Question) -> str:
    """The answer, worked out from the objects by another route than the package's."""
    at = {cell_names(3)[item.cell]: item for item in scene.objects}
    tally = Counter(str(item.digit) for item in scene.objects)
    argument = question.prompt[-1]
    match question.family:
        case "count":
            return str(tally[argument])
        case "read":
            return str(at[argument].digit)
        case "presence" | "biased presence":
            return "yes" if argument in tally else "no"
        case "comparison":
            return "yes" if at[question.prompt[1]].digit - at[argument].digit > 0 else "no"
        case name:
            return ATTRIBUTES[name][vars(at[argument])[name]]


def test_answers_match_a_recount() -> None:
    rng = random.Random(0)
    seen: Counter[str] = Counter()
    vocabulary = set(words(SceneConfig()))
    for scene in Scenes("train", 1).batch(range(150)).scenes:
        for question in questions(scene, dict.fromkeys(FAMILIES, 1.0), 24, rng):
            assert question.answer == _recount(scene, question), question
            assert {*question.prompt, question.answer} <= vocabulary
            assert len(question.prompt) == 3
            seen[question.family] += 1
    assert set(seen) == set(FAMILIES) and min(seen.values()) > 350


def test_presence_is_balanced_and_no_answer_dominates() -> None:
    rng = random.Random(1)
    answers: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
    for scene in Scenes("train", 2).batch(range(400)).scenes:
        for question in questions(scene, dict.fromkeys(FAMILIES, 1.0), 16, rng):
            answers[question.family][question.answer] += 1
    for family, tally in answers.items():
        top = tally.most_common(1)[0][1] / tally.total()
        limit = {"presence": 0.54, "comparison": 0.6, "count": 0.5, "read": 0.15}.get(family, 0.56)
        if family == BIASED_PRESENCE:
            assert 0.8 < tally["yes"] / tally.total() < 0.9
        else:
            assert top < limit, (family, tally)


def test_the_mix_follows_its_weights() -> None:
    scene = Scenes("train", 2).scene(0)
    drawn = questions(scene, {"count": 3.0, "read": 1.0, "tilt": 0.0}, 4000, random.Random(2))
    tally = Counter(question.family for question in drawn)
    assert set(tally) == {"count", "read"}
    assert abs(tally["count"] / 4000 - 0.75) < 0.03


def test_the_rng_is_the_only_chance() -> None:
    scene = Scenes("train", 2).scene(0)
    mix = dict.fromkeys(COMMON_FAMILIES, 1.0)
    first = questions(scene, mix, 12, random.Random(5))
    assert first == questions(scene, mix, 12, random.Random(5))
    assert first != questions(scene, mix, 12, random.Random(6))


def test_counts_above_nine_have_words() -> None:
    config = SceneConfig(image_size=96, grid=6, min_digits=12, max_digits=12, classes_per_scene=1)
    vocabulary = words(config)
    assert len(set(vocabulary)) == len(vocabulary) and {"10", "11", "12"} <= set(vocabulary)
    scene = Scenes("train", 0, config).scene(0)
    asked = questions(scene, {"count": 1.0}, 20, random.Random(0), grid=6)
    assert {question.answer for question in asked} == {"0", "12"}
    # the words of small scenes are those of always: checkpoints keep their numbers
    assert words(SceneConfig(max_digits=9)) == words(SceneConfig(max_digits=2))


def test_bad_mixes_are_named() -> None:
    scene = Scenes("train", 2).scene(0)
    with pytest.raises(ValueError, match="unknown \\['colour'\\]; expected some of"):
        questions(scene, {"colour": 1.0}, 1, random.Random(0))
    with pytest.raises(ValueError, match="non-negative weights"):
        questions(scene, {"count": 0.0}, 1, random.Random(0))
    with pytest.raises(ValueError, match="non-negative weights"):
        questions(scene, {"count": -1.0, "read": 2.0}, 1, random.Random(0))
