# SPDX-License-Identifier: Apache-2.0
"""`prereg evaluate`: its answers are the model's, one by one; its shares are counted by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.evaluate import PREDICTIONS, Evaluation, evaluate, score
from tests.train.places import make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def one_by_one(place: Path, records: list[Any], tokens: int) -> list[str]:
    """Without padding, without batches, by the template's text."""
    model = AutoModelForImageTextToText.from_pretrained(place / "model").eval()
    processor: Any = AutoProcessor.from_pretrained(place / "model")
    answers = []
    for record in records:
        question = record["conversations"][-2]["value"].replace("<image>\n", "<image>")
        images = [Image.open(place / "images" / name) for name in record["image"]]
        batch = processor(
            text=f"user: {question} assistant: ", images=images or None, return_tensors="pt"
        )
        with torch.no_grad():
            written = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        new = written[0, batch["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def test_answers_are_those_of_one_question_at_a_time(place: Path, tmp_path: Path) -> None:
    records = json.loads((place / "data.json").read_text())
    data = DataConfig(str(place / "data.json"), "llava", str(place / "images"))
    found = evaluate(place / "model", data, tmp_path, batch_size=5, max_new_tokens=4)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    answers = {line["where"]: (line["reference"], line["answer"]) for line in lines}
    assert len(answers) == found.questions == 24
    expected = one_by_one(place, records, 4)
    references = [record["conversations"][-1]["value"] for record in records]
    for number, pair in enumerate(zip(references, expected, strict=True)):
        assert answers[f"{place}/data.json:1[{number}]"] == pair
    assert len(set(expected)) > 2
    assert json.loads((tmp_path / "evaluation.json").read_text())["questions"] == 24
    assert found.commonest == 6 / 24


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.3}, {"num_beams": 3}, {"no_repeat_ngram_size": 1},
        {"eos_token_id": list(range(5, 40))},
    ],
)  # fmt: skip
def test_answers_are_greedy(place: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    """Of the model's own settings of generation the token ids alone count."""
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    data = DataConfig(str(place / "data.json"), "llava", str(place / "images"))
    evaluate(place / "model", data, tmp_path / "plain", max_new_tokens=4)
    evaluate(model, data, tmp_path / "set", max_new_tokens=4)
    plain, found = (
        [json.loads(line)["answer"] for line in (tmp_path / name / PREDICTIONS).open()]
        for name in ("plain", "set")
    )
    assert (found == plain) == ("eos_token_id" not in setting)


def test_shares() -> None:
    """Of pairs of a reference and an answer."""
    pairs = [
        ("Red", "red."), ("No.", "no"), ("two  cats", "Two cats"), ("A", "A"), ("B.", "B. A dog"),
        ("C", "It is A"), ("D", "I see nothing"), ("red", "blue"),
    ]  # fmt: skip
    assert score(pairs, bad=3) == Evaluation(
        questions=8, exact_match=4 / 8, choices=4, choice_accuracy=2 / 4, commonest=2 / 8, bad=3
    )
    assert score([("yes", "yes")], bad=0).choice_accuracy is None
    spaced = score([("Yes", "yes ."), ("a mat .", "A mat"), ("B .", "B")], bad=0)
    assert (spaced.exact_match, spaced.choices, spaced.choice_accuracy) == (1, 1, 1)


def test_bad_samples_are_counted(place: Path, tmp_path: Path) -> None:
    records = json.loads((place / "data.json").read_text())[:4]
    records[0]["image"] = ["absent.png"]
    records[1]["conversations"] = []
    (tmp_path / "d.json").write_text(json.dumps(records))
    data = DataConfig(str(tmp_path / "d.json"), "llava", str(place / "images"))
    found = evaluate(place / "model", data, tmp_path / "out", max_new_tokens=2)
    assert (found.questions, found.bad) == (2, 2)
    (tmp_path / "d.json").write_text(json.dumps(records[:2]))
    with pytest.raises(ValueError, match="expected questions, got 2 samples that cannot be used"):
        evaluate(place / "model", data, tmp_path / "none", max_new_tokens=2)
    assert not (tmp_path / "none").exists()


def test_a_placeholder_in_a_question(place: Path, tmp_path: Path) -> None:
    """With an image and without; in the answer it is a text like any other."""
    texts = [("what?", "a"), ("<image>?", "a"), ("what?", "an <image>")]
    records = [
        {
            "messages": [
                {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ],
            "images": ["0_0.png"] * len(parts),
        }
        for question, answer in texts
        for parts in ([{"type": "image"}], [])
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(str(path), images=str(place / "images"))
    found = evaluate(place / "model", data, tmp_path, max_new_tokens=2)
    assert (found.questions, found.bad) == (4, 2)
    lines = [json.loads(line) for line in (tmp_path / PREDICTIONS).open()]
    assert [line["where"].rsplit(":", 1)[1] for line in lines] == ["1", "5", "2", "6"]
    assert [line["reference"] for line in lines] == ["a", "an <image>"] * 2
