"""PRe in LLaMA-Factory: its own command by `prereg llamafactory`, at its defaults, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.packages.checkpoint import make_llava, write_messages
from tests.packages.compared import (
    FLOAT32,
    check_files,
    check_logs,
    check_low_precision,
    check_resumed,
    difference,
    head_error,
    step_errors,
    with_equal_answers,
)
from tests.packages.pairs import write_pairs
from tests.packages.run import Run, run

pytestmark = pytest.mark.packages

WEIGHT = 0.3
BOTH = pytest.mark.parametrize("tuned", ["full", "lora"])
STEPS = ("checkpoint-2", "checkpoint-4")


class Place:
    """A checkpoint, data, and the runs on them, each of which is started once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = make_llava(folder / "model")
        self.data = write_messages(folder / "data", is_split=False)
        write_pairs(folder / "data", rejected="rejected")
        columns = {name: name for name in ("messages", "images")}
        info = {
            "formatting": "sharegpt",
            "tags": {
                "role_tag": "role", "content_tag": "content", "user_tag": "user",
                "assistant_tag": "assistant",
            },
        }  # fmt: skip
        pairs = {**columns, "chosen": "chosen", "rejected": "rejected"}
        known = {
            "tiny": {**info, "file_name": self.data.name, "columns": columns},
            "pairs": {**info, "file_name": "pairs.jsonl", "columns": pairs, "ranking": True},
        }
        self.data.with_name("dataset_info.json").write_text(json.dumps(known))
        self.equal = with_equal_answers(self.data, folder / "equal")
        self.runs: dict[str, Run] = {}

    def run(
        self,
        tuned: str,
        rows: int = 2,
        micro_batches: int = 2,
        data: str = "equal",
        resumed: bool = False,
        ranks: int = 1,
        **settings: Any,
    ) -> Run:
        named = f"{tuned}-{rows}x{micro_batches}-{data}-{resumed}-{ranks}-{'-'.join(settings)}"
        if named in self.runs:
            return self.runs[named]
        place = self.folder / named
        output = place / "out"
        own = {
            "model_name_or_path": str(self.checkpoint), "stage": "sft", "do_train": True,
            "finetuning_type": tuned, "dataset": "tiny", "template": "llava",
            "dataset_dir": str(self.folder / data), "output_dir": str(output),
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches,
            "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
            "report_to": "none", "pre": {"head_learning_rate": 0.01},
        }  # fmt: skip
        if resumed:
            whole = self.run(tuned, rows, micro_batches, data)
            own["resume_from_checkpoint"] = str(whole.output / "checkpoint-2")
        variables = {}
        if ranks > 1:
            variables = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(ranks)}
            own["ddp_backend"] = "gloo"
        place.mkdir()
        (place / "sft.yaml").write_text(yaml.safe_dump(own | settings))
        command = ["prereg_kernels", "llamafactory", "train", "sft.yaml", f"pre.weight={WEIGHT}"]
        self.runs[named] = run("llamafactory", command, place, output, environment=variables)
        return self.runs[named]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("llamafactory"))


@BOTH
def test_a_step(place: Place, tuned: str) -> None:
    done = place.run(tuned)
    for number in (0, 3):
        found = step_errors(place.checkpoint, done, WEIGHT, number=number, is_mean_of_means=True)
        assert max(found.values()) < FLOAT32, found
    check_files(done, (*STEPS, "."))
    check_logs(done, "checkpoint-4")


@BOTH
def test_micro_batches(place: Place, tuned: str) -> None:
    two, one = (place.run(tuned, *sizes).step(0) for sizes in ((2, 2), (4, 1)))
    assert len(two["batches"]) == 2 and len(one["batches"]) == 1
    found = difference(two["gradients"], one["gradients"])
    assert max(found.values()) < FLOAT32, found


@BOTH
def test_resumed(place: Place, tuned: str) -> None:
    whole = place.run(tuned)
    check_resumed(whole, place.run(tuned, resumed=True), whole.step(0)["weights"])


def test_text_alone(place: Place) -> None:
    """Its collator adds an image that nothing attends to."""
    done = place.run("full", 1, 4, "data")
    batches = done.step(0)["batches"] + done.step(1)["batches"]
    hidden = [batch for batch in batches if not batch["attention_mask"].all()]
    assert any((batch["input_ids"] == 4).any() for batch in hidden)
    for number in (0, 1):
        found = step_errors(place.checkpoint, done, WEIGHT, number=number, is_mean_of_means=True)
        assert max(found.values()) < FLOAT32, found


def test_ranks(place: Place) -> None:
    done = place.run("full", 1, 2, "data", ranks=2)
    found = step_errors(place.checkpoint, done, WEIGHT, ranks=2, is_mean_of_means=True)
    assert max(found.values()) < FLOAT32, found
    check_files(done, STEPS)


def test_bfloat16(place: Place) -> None:
    """As its examples train."""
    two, one = (place.run("full", *sizes, bf16=True) for sizes in ((2, 2), (4, 1)))
    check_low_precision(place.checkpoint, two, one, WEIGHT, torch.bfloat16, is_mean_of_means=True)


@BOTH
def test_preferences(place: Place, tuned: str) -> None:
    """DPO: its loss is its own, and PRe's heads see the better and the worse answers' images."""
    done = place.run(tuned, data="data", stage="dpo", dataset="pairs")
    found = head_error(place.checkpoint, done, WEIGHT)
    assert found < FLOAT32, found
    check_files(done, STEPS)
