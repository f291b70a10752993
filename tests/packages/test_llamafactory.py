# SPDX-License-Identifier: Apache-2.0
"""PRe in LLaMA-Factory, as its page says: its own defaults, but for float32 and the sizes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from tests.docs.pages import ROOT, read_page
from tests.packages.checkpoint import QWEN_IMAGE, make_llava, make_qwen3, write_messages
from tests.packages.compared import (
    COPY,
    FLOAT32,
    check_files,
    check_logs,
    check_low_precision,
    check_projector,
    check_resumed,
    check_warning,
    check_whole,
    difference,
    head_error,
    merged_by_hand,
    step_errors,
    with_equal_answers,
)
from tests.packages.pairs import write_pairs
from tests.packages.run import Run, run

pytestmark = pytest.mark.packages

TEXT = (ROOT / "docs" / "trainers" / "llamafactory.md").read_text()
PAGE = read_page("docs", TEXT)
_, SETTINGS, COMMAND, MAKE, TRY, START, RESUME, MERGE, EXPORT = PAGE.blocks
COMMANDS = COMMAND.text.splitlines()  # in one process, and in several
ANCHOR = yaml.safe_load(SETTINGS.text)["pre"]["anchor"]
WEIGHT = 0.3  # by the command
HOW: dict[str, Any] = {"anchor": ANCHOR, "is_mean_of_means": True}
BOTH = pytest.mark.parametrize("tuned", ["full", "lora"])
STEPS = ("checkpoint-2", "checkpoint-4")
TARGETS = {  # {model: (what trains whole beside an adapter, template)}, of the page's table
    row[0]: (row[1], row[2])
    for row in re.findall(r"^\| ([^|]+) \| `([^`]+)` \| `([^`]+)`", TEXT, re.MULTILINE)
}
MODELS = {"llava": "LLaVA-1.5", "qwen3": "Qwen3-VL"}


class Place:
    """A checkpoint, data, and the runs on them, each of which is started once.

    Of the page's settings "lora" lacks the one that has the projector train; "projector" has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = {
            "llava": make_llava(folder / "llava"), "qwen3": make_qwen3(folder / "qwen3"),
        }  # fmt: skip
        self.checkpoint = self.checkpoints["llava"]
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
        model: str = "llava",
        **settings: Any,
    ) -> Run:
        how = f"{model}-{tuned}-{rows}x{micro_batches}-{data}-{resumed}-{ranks}"
        named = f"{how}-{'-'.join(settings)}"
        if named in self.runs:
            return self.runs[named]
        place = self.folder / named
        output = place / "out"
        target, template = TARGETS[MODELS[model]]
        own = {
            "model_name_or_path": str(self.checkpoints[model]), "stage": "sft", "do_train": True,
            "finetuning_type": "full" if tuned == "full" else "lora",
            "dataset": "tiny", "template": template,
            "dataset_dir": str(self.folder / data), "output_dir": str(output),
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches,
            "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
            "report_to": "none",
        }  # fmt: skip
        if resumed:
            whole = self.run(tuned, rows, micro_batches, data)
            own["resume_from_checkpoint"] = str(whole.output / "checkpoint-2")
        variables = {"NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}
        if ranks > 1:
            own["ddp_backend"] = "gloo"
        command = shlex.split(COMMANDS[ranks - 1], comments=True)
        while "=" in command[0]:
            name, _, value = command.pop(0).partition("=")
            variables[name] = value
        place.mkdir()
        written, projector = SETTINGS.text, re.compile(r"^additional_target: .*\n", re.MULTILINE)
        assert len(projector.findall(written)) == 1
        added = "" if tuned == "lora" else f"additional_target: {target}\n"
        written = projector.sub(added, written)
        (place / "sft.yaml").write_text(written + yaml.safe_dump(own | settings))
        self.runs[named] = start(command, place, output, variables)
        return self.runs[named]


def start(
    command: list[str], place: Path, output: Path, variables: Mapping[str, str], **how: Any
) -> Run:
    """A command of `prereg`, which the test environment has as a module."""
    assert command[0] == "prereg"
    return run(
        "llamafactory",
        ["prereg_kernels", *command[1:]],
        place,
        output,
        environment=variables,
        **how,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("llamafactory"))


@BOTH
def test_a_step(place: Place, tuned: str) -> None:
    done = place.run(tuned)
    for number in (0, 3):
        found = step_errors(place.checkpoint, done, WEIGHT, **HOW, number=number)
        assert max(found.values()) < FLOAT32, found
    check_files(done, (*STEPS, "."))
    check_logs(done, "checkpoint-4")


def test_the_projector_beside_an_adapter(place: Place) -> None:
    done = place.run("projector")
    for number in (0, 3):
        found = step_errors(place.checkpoint, done, WEIGHT, **HOW, number=number)
        assert max(found.values()) < FLOAT32, found
    check_projector(done, done.output)
    check_projector(done, done.output / "checkpoint-4")
    check_warning(place.run("lora"), done)
    check_said(done)


@BOTH
def test_deepstack(place: Place, tuned: str) -> None:
    """Of Qwen3-VL, whose projector is a merger and, of deepstack, three more: all train beside an
    adapter. In full tuning LLaMA-Factory counts the three as the tower.
    """
    settings: dict[str, Any] = {"freeze_multi_modal_projector": False} if tuned == "full" else {}
    done = place.run("projector" if tuned == "lora" else tuned, model="qwen3", **settings)
    how = {**HOW, "image_token": QWEN_IMAGE}
    for number in (0, 3):
        found = step_errors(place.checkpoints["qwen3"], done, WEIGHT, **how, number=number)
        assert max(found.values()) < FLOAT32, found
    check_files(done, (*STEPS, "."))
    check_logs(done, "checkpoint-4")
    start, targets = done.step(0)["weights"], TARGETS[MODELS["qwen3"]][0].split(",")
    moved = {name for name, x in start.items() if not torch.equal(done.weights[name], x)}
    for target in targets:
        own = {name for name in start if f"visual.{target}." in name and ".original_" not in name}
        assert len(own) == 6, own  # of a norm and two matrices
        assert (own <= moved) if tuned == "lora" or target == "merger" else not own & moved
    if tuned == "lora":
        check_projector(done, done.output)


def test_the_projector_with_full_tuning(place: Place) -> None:
    done = place.run("full", freeze_multi_modal_projector=False)
    for number in (0, 3):
        found = step_errors(place.checkpoint, done, WEIGHT, **HOW, number=number)
        assert max(found.values()) < FLOAT32, found
    check_whole(done)


def check_said(done: Run) -> None:
    """It says that the projector does not train; what it counts has the copy of it."""
    assert "Set multi model projector not trainable: ['multi_modal_projector']" in done.text
    [counted] = re.findall(r"trainable params: ([\d,]+) \|\|", done.text)
    start = done.step(0)["weights"]
    trained = {name: x.numel() for name, x in start.items() if "lora_" in name or COPY in name}
    assert int(counted.replace(",", "")) == sum(trained.values())


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
        found = step_errors(place.checkpoint, done, WEIGHT, **HOW, number=number)
        assert max(found.values()) < FLOAT32, found


def test_ranks(place: Place) -> None:
    done = place.run("full", 1, 2, "data", ranks=2)
    weight = yaml.safe_load(SETTINGS.text)["pre"]["weight"]
    found = step_errors(place.checkpoint, done, weight, **HOW, ranks=2)
    assert max(found.values()) < FLOAT32, found
    check_files(done, STEPS)


def test_bfloat16(place: Place) -> None:
    """As its examples train."""
    two, one = (place.run("full", *sizes, bf16=True, use_cpu=True) for sizes in ((2, 2), (4, 1)))
    check_low_precision(place.checkpoint, two, one, WEIGHT, torch.bfloat16, **HOW)


@BOTH
def test_preferences(place: Place, tuned: str) -> None:
    """DPO: its loss is its own, and PRe's heads see the better and the worse answers' images."""
    done = place.run(tuned, data="data", stage="dpo", dataset="pairs")
    found = head_error(place.checkpoint, done, WEIGHT, anchor=ANCHOR)
    assert found < FLOAT32, found
    check_files(done, STEPS)


def test_the_page_s_try(tmp_path: Path) -> None:
    """Trained, resumed from its first checkpoint, and merged."""
    make, assemble = (shlex.split(line)[1:] for line in MAKE.text.splitlines())
    for command in ([str(ROOT / make[0]), *make[1:]], ["-m", "prereg_kernels", *assemble]):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)
    (tmp_path / "try.yaml").write_text(TRY.text)
    output = tmp_path / "photos" / "out"
    done = start(shlex.split(START.text), tmp_path, output, {})
    first, *_, last = (entry["pre_loss"] for entry in done.logs(""))
    assert last < first - 0.1
    check_projector(done, output)
    done = replace(done, recorded=done.recorded.rename(tmp_path / "whole"))
    resumed = start(shlex.split(RESUME.text), tmp_path, output, {})
    check_resumed(done, resumed, done.step(0)["weights"])
    (tmp_path / "export.yaml").write_text(MERGE.text)
    merged = tmp_path / "photos" / "merged"
    run("llamafactory", shlex.split(EXPORT.text), tmp_path, merged)
    check_merged(tmp_path / "photos" / "llava", resumed, merged)


def test_a_merged_model(place: Place) -> None:
    """It is the adapter's, and has nothing of PRe."""
    done = place.run("lora")
    merged = place.folder / "merged"
    settings = {
        "model_name_or_path": str(place.checkpoint), "adapter_name_or_path": str(done.output),
        "template": "llava", "export_dir": str(merged), "infer_dtype": "float32",
        "trust_remote_code": False,
    }  # fmt: skip
    (place.folder / "export.yaml").write_text(yaml.safe_dump(settings))
    start(["prereg", "llamafactory", "export", "export.yaml"], place.folder, merged, {})
    check_merged(place.checkpoint, done, merged)


def check_merged(checkpoint: Path, done: Run, merged: Path) -> None:
    assert not (merged / "pre").exists()
    expected = merged_by_hand(checkpoint, done)
    model, told = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not any(told.values()), told
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight.double(), expected[name], atol=1e-6), name


@pytest.mark.parametrize(
    "flag, variable, message",
    [
        ("pre.wieght=1", "", "pre.wieght: not a setting of PRe; expected one of layers, weight"),
        ("stage=pt", "", "stage: expected one of sft, dpo with PRe, got 'pt'"),
        ("stage=sft", "USE_RAY", "USE_RAY: expected it off, as PRe is not in what it runs; got 1"),
    ],
)
def test_an_error_is_a_line(
    place: Place, tmp_path: Path, flag: str, variable: str, message: str
) -> None:
    (tmp_path / "sft.yaml").write_text("stage: sft")
    command = ["prereg", "llamafactory", "train", "sft.yaml", flag]
    variables = {variable: "1"} if variable else {}
    done = start(command, tmp_path, tmp_path, variables, is_expected_to_fail=True)
    last = done.text.strip().splitlines()[-1]
    assert last.startswith(f"prereg: {message}"), done.text[-2000:]
