# SPDX-License-Identifier: Apache-2.0
"""Packing: labels at the answers, and questions that cannot see one another."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from prereg_kernels.demo.data.packing import IGNORE, Packer, TrainStream, build_tokenizer
from prereg_kernels.demo.data.questions import (
    COMMON_FAMILIES,
    FAMILIES,
    Question,
    description,
    questions,
    words,
)
from prereg_kernels.demo.data.scenes import ATTRIBUTES, SceneConfig, Scenes
from prereg_kernels.demo.model.llava import build_model
from tests.demo.tiny import MODEL

MIX = dict.fromkeys(COMMON_FAMILIES, 1.0)


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(build_tokenizer(SceneConfig()), 36)


@pytest.fixture(scope="module")
def model(packer: Packer) -> LlavaForConditionalGeneration:
    return build_model(MODEL, SceneConfig(), packer.tokenizer, seed=0).eval()


def _asked(count: int, each: int) -> tuple[np.ndarray, list[list[Question]]]:
    batch = Scenes("train", 0).batch(range(count))
    rng = random.Random(0)
    mix = dict.fromkeys(FAMILIES, 1.0)
    return batch.images, [questions(scene, mix, each, rng) for scene in batch.scenes]


def test_tokenizer_knows_every_word_and_survives_saving(packer: Packer, tmp_path) -> None:
    packer.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(words(SceneConfig()))
    ids = loaded(text)["input_ids"]
    assert ids == packer.encode(text.split()) and loaded.unk_token_id not in ids
    assert loaded.decode(loaded("<image> how many 3")["input_ids"]) == "<image> how many 3"
    assert loaded.pad_token_id == 0


def test_labels_are_the_answers_and_nothing_else(packer: Packer) -> None:
    images, asked = _asked(5, 7)
    batch = packer.pack(images, asked)
    for b, row in enumerate(asked):
        at = torch.nonzero(batch["labels"][b] != IGNORE).flatten().tolist()
        assert len(at) == len(row)
        for place, question in zip(at, row, strict=True):
            assert packer.tokenizer.convert_ids_to_tokens(int(batch["labels"][b, place])) == (
                question.answer
            )
            words_before = packer.tokenizer.convert_ids_to_tokens(
                batch["input_ids"][b, place - 3 : place].tolist()
            )
            assert tuple(words_before) == question.prompt
            assert batch["position_ids"][b, place - 3 : place + 1].tolist() == [36, 37, 38, 39]
    assert torch.equal(batch["position_ids"][:, :36], torch.arange(36).expand(5, 36))


def test_the_mask_is_the_rule(packer: Packer) -> None:
    """Recomputed pair by pair, with questions of unequal number and so with padding."""
    images, asked = _asked(3, 4)
    asked[1] = asked[1][:2]
    batch = packer.pack(images, asked)
    mask = batch["attention_mask"]
    assert mask.dtype == torch.bool and mask.shape == (3, 1, 52, 52)
    for b, row in enumerate(asked):
        block = [0] * 36 + [j + 1 for j in range(len(row)) for _ in range(4)]
        block += [-1] * (52 - len(block))
        for q in range(52):
            for k in range(52):
                seen = k <= q and (block[k] == block[q] or (block[k] == 0 and block[q] >= 0))
                assert bool(mask[b, 0, q, k]) == seen


def test_other_questions_do_not_change_an_answer(
    packer: Packer, model: LlavaForConditionalGeneration
) -> None:
    images, asked = _asked(2, 5)
    changed = [list(row) for row in asked]
    for row in changed:
        row[2] = Question("read", ("digit", "at", "bottom"), "9")
    assert asked[0][2] != changed[0][2]
    with torch.no_grad():
        before, after = (
            model(**packer.pack(images, version)).logits for version in (asked, changed)
        )
    kept = torch.ones(before.shape[1], dtype=torch.bool)
    kept[36 + 8 : 36 + 12] = False
    assert torch.equal(before[:, kept], after[:, kept])
    assert not torch.allclose(before[:, ~kept], after[:, ~kept])


def test_packed_alone_and_prompt_agree(
    packer: Packer, model: LlavaForConditionalGeneration
) -> None:
    """A packed question is answered as if asked alone, and as `generate`'s prompt asks it."""
    images, asked = _asked(1, 6)
    with torch.no_grad():
        packed = model(**packer.pack(images, asked)).logits[0, 36:].view(6, 4, -1)[:, 2]
        for j, question in enumerate(asked[0]):
            single = packer.pack(images, [[question]])
            assert single["attention_mask"].shape == (1, 40)
            alone = model(**single).logits[0, 38]
            prompt = model(**packer.prompts(images, [question])).logits[0, -1]
            torch.testing.assert_close(packed[j], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(packed[j], prompt, rtol=1e-4, atol=1e-5)


def test_prompts_of_unequal_length_are_padded_on_the_left(
    packer: Packer, model: LlavaForConditionalGeneration
) -> None:
    images = Scenes("train", 0).batch(range(2)).images
    short, long = Question("x", ("many", "3"), "1"), Question("y", ("digit", "at", "top"), "1")
    together = packer.prompts(images, [short, long])
    assert together["attention_mask"].sum(dim=1).tolist() == [38, 39]
    with torch.no_grad():
        alone = model.generate(**packer.prompts(images[:1], [short]), max_new_tokens=1)[0, -1]
        both = model.generate(**together, max_new_tokens=1)[0, -1]
    assert alone == both


def _stream(**overrides: object) -> TrainStream:
    settings: dict[str, object] = {
        "scenes": Scenes("train", 4),
        "packer": Packer(build_tokenizer(SceneConfig()), 36),
        "families": MIX,
        "questions_per_scene": 5,
        "micro_batch": 4,
        "accumulation": 2,
    }
    return TrainStream(**{**settings, **overrides})  # type: ignore[arg-type]


def test_a_step_is_a_function_of_its_number() -> None:
    first, again = _stream().micro_batches(17), _stream().micro_batches(17)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = _stream().micro_batches(18)
    assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])


def test_accumulation_only_cuts_a_step_differently() -> None:
    two = _stream().micro_batches(3)
    one = _stream(micro_batch=8, accumulation=1).micro_batches(3)
    for name in one[0]:
        assert torch.equal(one[0][name], torch.cat([micro[name] for micro in two]))


def test_unknown_families_are_named() -> None:
    with pytest.raises(ValueError, match="unknown"):
        _stream(families={"weather": 1.0})


def test_mismatched_questions_are_named(packer: Packer) -> None:
    images, asked = _asked(2, 1)
    with pytest.raises(ValueError, match="asked: expected one list for each of 2 images, got 1"):
        packer.pack(images, asked[:1])


def test_distinct_scenes_come_again_with_their_questions() -> None:
    few = _stream(distinct_scenes=2, micro_batch=3)
    first, later = few.micro_batches(0)
    rows = [*first["input_ids"], *later["input_ids"]]
    pictures = [*first["pixel_values"], *later["pixel_values"]]
    for index in range(2, 6):
        assert torch.equal(rows[index], rows[index - 2])
        assert torch.equal(pictures[index], pictures[index - 2])
    assert not torch.equal(pictures[0], pictures[1])


def _described(
    count: int = 6, micro_batch: int = 3
) -> tuple[list[dict[str, torch.Tensor]], Packer]:
    stream = _stream(text=True, micro_batch=micro_batch, accumulation=count // micro_batch)
    return stream.micro_batches(2), stream.packer


def test_a_description_holds_the_scene_and_no_image() -> None:
    """Read back from the tokens: every digit with its attributes, then the answers, worked out anew
    from the description alone."""
    batches, packer = _described()
    assert sum(len(batch["input_ids"]) for batch in batches) == 6
    for batch in batches:
        assert batch.keys() == {"input_ids", "labels", "position_ids", "attention_mask"}
        for ids, labels, positions, mask in zip(
            batch["input_ids"], batch["labels"], batch["position_ids"], batch["attention_mask"],
            strict=True,
        ):  # fmt: skip
            text = packer.tokenizer.convert_ids_to_tokens(ids.tolist())
            assert "<image>" not in text and "<unk>" not in text
            asked = next(
                i for i, word in enumerate(text) if word in ("how", "digit", "is", "larger")
            )
            told = [tuple(text[i : i + 6]) for i in range(0, asked, 6)]
            at = {cell: int(digit) for cell, digit, *_ in told}
            assert asked == 6 * len(at)  # no cell twice
            for _, _, *attributes in told:
                pairs = zip(attributes, ATTRIBUTES.values(), strict=True)
                assert all(word in values for word, values in pairs)
            for j in range(5):
                place = asked + 4 * j
                first, second, third, answer = text[place : place + 4]
                match first:
                    case "how":
                        expected = str(list(at.values()).count(int(third)))
                    case "digit":
                        expected = str(at[third])
                    case "is":
                        expected = "yes" if int(third) in at.values() else "no"
                    case _:
                        expected = "yes" if at[second] > at[third] else "no"
                assert answer == expected
                assert labels[place : place + 4].tolist() == [IGNORE] * 3 + [int(ids[place + 3])]
                assert positions[place : place + 4].tolist() == list(range(asked, asked + 4))
                seen = set(torch.nonzero(mask[0, place + 3]).flatten().tolist())
                assert seen == {*range(asked), *range(place, place + 4)}
            assert (labels != IGNORE).sum() == 5
            assert set(text[asked + 20 :]) <= {"<pad>"}


def test_described_scenes_are_others_and_a_function_of_the_step() -> None:
    batches, _ = _described()
    again, _ = _described()
    for a, b in zip(batches, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    [whole], _ = _described(micro_batch=6)  # cut otherwise, but for the padding
    rows = [row for batch in batches for row in batch["input_ids"]]
    for row, same in zip(rows, whole["input_ids"], strict=True):
        assert row[row != 0].tolist() == same[same != 0].tolist()
    packer = Packer(build_tokenizer(SceneConfig()), 36)
    grid = range(2 * 6, 2 * 6 + 6)
    shown = {
        frozenset(description(scene, random.Random(0)))
        for scene in Scenes("train", 4).batch(grid).scenes
    }
    for row in rows:
        text = packer.tokenizer.convert_ids_to_tokens(row[row != 0].tolist())
        assert frozenset(text[: len(text) - 20]) not in shown
