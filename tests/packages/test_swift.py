# SPDX-License-Identifier: Apache-2.0
"""PRe in ms-swift, as its page says: its own defaults, but for float32 and the sizes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from prereg_kernels.cli.launch import SWIFT_PLUGIN
from tests.docs.pages import ROOT, read_page
from tests.packages.checkpoint import QWEN_IMAGE, make_llava, make_qwen, make_qwen3, write_messages
from tests.packages.compared import (
    FLOAT32,
    check_copied,
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
    of_step,
    step_errors,
)
from tests.packages.pairs import write_pairs
from tests.packages.run import Run, run

pytestmark = pytest.mark.packages

PAGE = read_page("docs", (ROOT / "docs" / "trainers" / "ms-swift.md").read_text())
COMMAND, FILE, _, MAKE, TRY = PAGE.blocks
WEIGHT = {"lora": 0.3, "projector": 0.3, "full": 0.5}
ANCHOR = "pre_projector"
BOTH = pytest.mark.parametrize("tuned", ["full", "lora"])
STEPS = ("checkpoint-2", "checkpoint-4")
PROJECTORS = {
    "llava": ["multi_modal_projector"],
    "qwen": ["merger"],
    "qwen3": ["merger", *(f"deepstack_merger_list.{number}" for number in range(3))],
}
KINDS = {"llava": "llava1_5_hf", "qwen": "qwen2_5_vl", "qwen3": "qwen3_vl"}


class Place:
    """Checkpoints, data, and the runs on them, each of which is started once.

    Full tuning is started with the page's file, LoRA by its command: "lora" without the projector,
    "projector" with it, as the page has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = {
            "llava": make_llava(folder / "llava"), "qwen": make_qwen(folder / "qwen"),
            "qwen3": make_qwen3(folder / "qwen3"),
        }  # fmt: skip
        self.data = write_messages(folder / "data", is_split=False)
        self.pairs = write_pairs(folder / "data", rejected="rejected_response")
        self.runs: dict[str, Run] = {}

    def run(
        self,
        tuned: str,
        rows: int = 2,
        micro_batches: int = 2,
        model: str = "llava",
        resumed: bool = False,
        ranks: int = 1,
        command: str = "sft",
        **settings: str,
    ) -> Run:
        others = "".join(f"-{name}-{value}" for name, value in settings.items() if "/" not in value)
        named = f"{command}-{tuned}-{rows}x{micro_batches}-{model}-{resumed}-{ranks}{others}"
        if named in self.runs:
            return self.runs[named]
        place = self.folder / named
        output = place / "out"
        own: dict[str, Any] = {
            "model": str(self.checkpoints[model]), "model_type": KINDS[model],
            "template": KINDS[model], "tuner_type": "full" if tuned == "full" else "lora",
            "torch_dtype": "float32",
            "dataset": str(self.data), "output_dir": str(output), "add_version": "false",
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches,
            "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
            "lora_dropout": 0, "check_model": "false", **settings,
        }  # fmt: skip
        if resumed:
            whole = self.run(tuned, rows, micro_batches, model)
            own["resume_from_checkpoint"] = str(whole.output / "checkpoint-2")
        text = COMMAND.text.replace("$(prereg swift-plugin)", str(SWIFT_PLUGIN))
        start = shlex.split(text.replace("\\\n", "").replace('"weight": 0.5', '"weight": 0.3'))
        assert start[:3] == ["swift", "sft", "..."] and ANCHOR in start[-1]
        start = ["swift", command, *start[3:]]
        projector = start.index("--modules_to_save")
        assert start[projector + 1 : projector + 2] == PROJECTORS["llava"]
        start[projector + 1 : projector + 2] = PROJECTORS[model]
        if tuned != "projector":
            del start[projector : projector + 1 + len(PROJECTORS[model])]
        if tuned == "full":
            place.mkdir()
            assert ANCHOR in FILE.text
            text = FILE.text.replace("PATH", str(SWIFT_PLUGIN))
            (place / "sft.yaml").write_text(text + yaml.safe_dump(own))
            start = ["swift", command, "sft.yaml"]
        else:
            start += [part for n, value in own.items() for part in (f"--{n}", str(value))]
        variables = {"NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}
        self.runs[named] = run("swift", start, place, output, environment=variables)
        return self.runs[named]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("swift"))


@BOTH
def test_a_step(place: Place, tuned: str) -> None:
    done = place.run(tuned)
    for number in (0, 3):
        found = step_errors(
            place.checkpoints["llava"], done, WEIGHT[tuned], number=number, anchor=ANCHOR
        )
        assert max(found.values()) < FLOAT32, found
    check_files(done, STEPS)
    check_logs(done, "checkpoint-4")


@pytest.mark.parametrize("model", KINDS)
def test_the_projector_beside_an_adapter(place: Place, model: str) -> None:
    done = place.run("projector", model=model)
    image = {} if model == "llava" else {"image_token": QWEN_IMAGE}
    for number in (0, 3):
        found = step_errors(
            place.checkpoints[model], done, WEIGHT["projector"], number=number, anchor=ANCHOR,
            **image,
        )  # fmt: skip
        assert max(found.values()) < FLOAT32, found
    check_projector(done, done.output / "checkpoint-4")
    check_copied(done, PROJECTORS[model])
    check_warning(place.run("lora", model=model), done)


def test_the_projector_with_full_tuning(place: Place) -> None:
    done = place.run("full", freeze_aligner="false")
    for number in (0, 3):
        found = step_errors(
            place.checkpoints["llava"], done, WEIGHT["full"], number=number, anchor=ANCHOR
        )
        assert max(found.values()) < FLOAT32, found
    check_whole(done)


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


def test_only_the_model_resumed(place: Place) -> None:
    """ms-swift reads the weights itself, and hides the checkpoint from Trainer."""
    whole = place.run("lora")
    flags: dict[str, Any] = {"resume_only_model": "true", "ignore_data_skip": "true"}
    start = place.run("lora", resumed=True, **flags).step(0)["weights"]
    saved = load_file(whole.output / "checkpoint-2" / "pre" / "pre_heads.safetensors")
    saved = {name: x for name, x in saved.items() if x.is_floating_point()}
    assert len(saved) == 4
    for name, x in saved.items():
        [ours] = [y for n, y in start.items() if n.endswith(f"pre_heads.{name}")]
        assert torch.equal(ours, x), name


@BOTH
def test_a_template_that_takes_the_ids(place: Place, tuned: str) -> None:
    """Qwen2.5-VL's makes embeddings of them before the model is called."""
    done = place.run(tuned, model="qwen")
    for number in (0, 3):
        found = step_errors(
            place.checkpoints["qwen"], done, WEIGHT[tuned], number=number, anchor=ANCHOR,
            image_token=QWEN_IMAGE,
        )  # fmt: skip
        assert max(found.values()) < FLOAT32, found
    check_files(done, STEPS)


def test_ranks(place: Place) -> None:
    done = place.run("lora", 1, 2, ranks=2)
    found = step_errors(place.checkpoints["llava"], done, WEIGHT["lora"], ranks=2, anchor=ANCHOR)
    assert max(found.values()) < FLOAT32, found
    check_files(done, STEPS)


def test_sequences_that_ranks_share(place: Place) -> None:
    """Its own Ulysses: two ranks have a half of each sequence."""
    done = place.run("lora", ranks=2, sequence_parallel_size="2")
    step = of_step(done)
    assert all(
        torch.equal(x, done.step(0, 1)["gradients"][n]) for n, x in step["gradients"].items()
    )
    for number in (0, 3):
        found = step_errors(
            place.checkpoints["llava"], done, WEIGHT["lora"], number=number, anchor=ANCHOR
        )
        assert max(found.values()) < FLOAT32, found
    check_logs(done, "checkpoint-4")


def test_preferences(place: Place) -> None:
    """DPO: its loss is its own, and PRe's heads see the better and the worse answers' images."""
    done = place.run("lora", command="rlhf", rlhf_type="dpo", dataset=str(place.pairs))
    found = head_error(place.checkpoints["llava"], done, WEIGHT["lora"], anchor=ANCHOR)
    assert found < FLOAT32, found
    check_files(done, STEPS)


def test_bfloat16(place: Place) -> None:
    """As a checkpoint of this dtype is trained."""
    two, one = (
        place.run(
            "full", *sizes, torch_dtype="bfloat16", use_cpu="true", max_steps="16", save_steps="16"
        )  # 4 are too few: steps differ by more than the loss falls
        for sizes in ((2, 2), (4, 1))
    )
    check_low_precision(
        place.checkpoints["llava"], two, one, WEIGHT["full"], torch.bfloat16,
        last="checkpoint-16", anchor=ANCHOR,
    )  # fmt: skip


def test_the_page_s_try(tmp_path: Path) -> None:
    make, assemble = MAKE.text.splitlines()
    (_, script, *rest), (_, *arguments) = shlex.split(make), shlex.split(assemble)
    for command in ([str(ROOT / script), *rest], ["-m", "prereg_kernels", *arguments]):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True)
    text = TRY.text.replace("\\\n", "").replace("$(prereg swift-plugin)", str(SWIFT_PLUGIN))
    done = run("swift", shlex.split(text), tmp_path, tmp_path / "photos" / "out")
    [logged] = done.output.glob("*/logging.jsonl")
    losses = [json.loads(line).get("pre_loss") for line in logged.read_text().splitlines()]
    first, *_, last = (x for x in losses if x is not None)
    assert last < first - 0.1
    check_projector(done, logged.parent / "checkpoint-6")


def test_a_merged_model(place: Place) -> None:
    """It is the adapter's, and has nothing of PRe."""
    done = place.run("lora")
    merged = place.folder / "merged"
    start = [
        "swift", "export", "--adapters", str(done.output / "checkpoint-4"), "--merge_lora", "true",
        "--output_dir", str(merged), "--torch_dtype", "float32",
    ]  # fmt: skip
    run("swift", start, place.folder, merged)
    assert not (merged / "pre").exists()
    expected = merged_by_hand(place.checkpoints["llava"], done)
    model, told = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not any(told.values()), told
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight.double(), expected[name], atol=1e-6), name
