# SPDX-License-Identifier: Apache-2.0
"""`prereg evaluate --tasks` through lmms-eval, in its release 0.7.3, on a task of local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.packages.run import folder_of, run
from tests.train.places import make_place
from tests.train.test_evaluate import one_by_one

pytestmark = pytest.mark.packages
TABLE = "gqa,mmmu_val,ai2d,mmstar,textvqa_val,ocrbench,realworldqa,mmvp"
"""The columns of the paper's table, as lmms-eval names them."""
VISUALS = """
from PIL import Image


def visuals(doc):
    return [Image.open(path) for path in doc["images"]]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a task: to 12 of 24 questions the reference is what the model answers."""
    place = make_place(tmp_path_factory.mktemp("place"))
    records = json.loads((place / "data.json").read_text())
    answers = one_by_one(place, records, 4)
    tasks = place / "tasks"
    tasks.mkdir()
    rows = []
    for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
        question = record["conversations"][0]["value"].replace("<image>\n", "")
        images = [str(place / "images" / name) for name in record["image"]]
        reference = answer if number % 2 else f"{answer} not"
        rows.append({"images": images, "question": question, "answer": reference})
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "utils.py").write_text(VISUALS)
    task = {
        "task": "local", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}},
        "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 4, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }  # fmt: skip
    text = yaml.safe_dump(task) + "doc_to_visual: !function utils.visuals\n"
    (tasks / "local.yaml").write_text(text)
    return place


def evaluate(place: Path, out: Path, *arguments: str, **others: Any) -> str:
    command = ("prereg_kernels", "evaluate", str(place / "model"), "--out", str(out), *arguments)
    cache = {"HF_HOME": str(place / "cache"), "HF_DATASETS_OFFLINE": "1"}
    return run("lmms_eval", command, place, out, environment=cache, **others).text


def test_answers_are_those_of_one_question_at_a_time(place: Path, tmp_path: Path) -> None:
    """In batches, of several images, one and none."""
    text = evaluate(
        place, tmp_path, "--tasks", "local", "--task-files", str(place / "tasks"), "--batch", "5"
    )
    assert "local: exact_match 0.5" in text.splitlines()
    facts = json.loads((tmp_path / "tasks.json").read_text())
    assert facts["results"] == {"local": {"exact_match": 0.5}} and facts["limit"] is None


def test_a_task_that_is_none(place: Path, tmp_path: Path) -> None:
    """The paper's are known, as the message names another one."""
    text = evaluate(place, tmp_path, "--tasks", f"{TABLE},drawing", is_expected_to_fail=True)
    assert text.splitlines()[-1] == (
        "prereg: --tasks: expected tasks that lmms-eval knows, got drawing"
    )
    assert (folder_of("lmms_eval") / "lmms_eval" / "tasks" / "mmvp").is_dir()
