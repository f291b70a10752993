# SPDX-License-Identifier: Apache-2.0
"""PRe in axolotl: `axolotl train x.yml` with the plugin, at its defaults, in float32.

Not in bfloat16, its choice on a GPU: on a CPU transformers then asks for `use_cpu`, which is no
setting of axolotl's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from tests.docs.pages import ROOT, read_page
from tests.packages.checkpoint import QWEN_IMAGE, make_llava, make_qwen3, write_messages
from tests.packages.compared import (
    FLOAT32,
    check_copied,
    check_files,
    check_logs,
    check_projector,
    check_resumed,
    difference,
    merged_by_hand,
    step_errors,
)
from tests.packages.run import Run, run

pytestmark = pytest.mark.packages

PAGE = read_page("docs", (ROOT / "docs" / "trainers" / "axolotl.md").read_text())
SETTINGS = PAGE.blocks[0]
WEIGHT = 0.3
QUIET = {"AXOLOTL_DO_NOT_TRACK": "1"}
TUNED: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {
        "adapter": "lora", "lora_r": 8, "lora_alpha": 16,
        "lora_target_modules": ["q_proj", "v_proj"],
        # axolotl turns them on, and stops at LLaVA with the advice to turn them off
        "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
    },
}  # fmt: skip
TUNED["projector"] = TUNED["lora"]  # and what the page says
MERGERS = ["merger", *(f"deepstack_merger_list.{number}" for number in range(3))]
TUNED["mergers"] = TUNED["lora"] | {"lora_modules_to_save": MERGERS}
BOTH = pytest.mark.parametrize("tuned", ["full", "lora"])
STEPS = ("checkpoint-2", "checkpoint-4")
PLUGIN = "prereg_kernels.trainers.axolotl.PRePlugin"
ANCHOR = "pre_projector"
# L_LM of a step is the mean of its micro-batches' means, as axolotl takes it
HOW: dict[str, Any] = {"is_mean_of_means": True, "anchor": ANCHOR}


def write_chats(folder: Path) -> tuple[Path, Path, Path]:
    """(chats with the path of an image in its part, the same with questions and answers of equal
    lengths, those of one image with it in a column).
    """
    chats = write_messages(folder, is_split=True)
    lines, equal, column = [], [], []
    for line in chats.read_text().splitlines():
        row = json.loads(line)
        paths = iter(row["images"])
        question, answer = row["messages"]
        for part in question["content"]:
            if part["type"] == "image":
                part["path"] = next(paths)
        lines.append(json.dumps({"messages": [question, answer]}))
        question["content"][-1]["text"] = "what is it?"
        answer["content"][-1]["text"] = answer["content"][-1]["text"][:3]
        equal.append(json.dumps({"messages": [question, answer]}))
        if len(row["images"]) == 1:
            question["content"][0] = {"type": "image"}
            column.append(json.dumps({**row, "messages": [question, answer]}))
    kinds = {"chats": lines, "equal": equal, "column": column}
    for name, content in kinds.items():
        (folder / f"{name}.jsonl").write_text("\n".join(content) + "\n")
    chats, equals, columns = (folder / f"{name}.jsonl" for name in kinds)
    return chats, equals, columns


class Place:
    """A checkpoint, data, and the runs on them, each of which is started once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = make_llava(folder / "model")
        self.chats, self.equal, self.column = write_chats(folder / "data")
        self.runs: dict[str, Run] = {}

    def run(
        self,
        tuned: str,
        rows: int = 2,
        micro_batches: int = 2,
        *,
        data: str = "equal",
        resumed: bool = False,
        is_expected_to_fail: bool = False,
        model: Path | None = None,
        **settings: Any,
    ) -> Run:
        named = f"{tuned}-{rows}x{micro_batches}-{data}-{resumed}-{len(settings)}"
        if named in self.runs:
            return self.runs[named]
        place = self.folder / named
        output = place / "out"
        file = {"chats": self.chats, "equal": self.equal, "column": self.column}[data]
        own = {
            "base_model": str(model or self.checkpoint), "processor_type": "AutoProcessor",
            "chat_template": "tokenizer_default", "skip_prepare_dataset": True,
            "remove_unused_columns": False, "sample_packing": False,
            "datasets": [{
                "path": str(file), "ds_type": "json", "type": "chat_template",
                "field_messages": "messages",
            }],
            "dataset_prepared_path": str(place / "prepared"), "output_dir": str(output),
            "sequence_len": 256, "micro_batch_size": rows, "seed": 42,
            "gradient_accumulation_steps": micro_batches, "max_steps": 4, "save_steps": 2,
            "logging_steps": 1, "learning_rate": 1e-3, "optimizer": "adamw_torch",
            "bf16": False, "plugins": [PLUGIN],
            "pre": {"weight": WEIGHT, "anchor": ANCHOR, "head_learning_rate": "1e-2"},
            **TUNED[tuned],
        }  # fmt: skip
        if resumed:
            whole = self.run(tuned, rows, micro_batches, data=data)
            own["resume_from_checkpoint"] = str(whole.output / "checkpoint-2")
        place.mkdir()
        written = ""
        if tuned == "projector":
            written = SETTINGS.text  # letter for letter
            own = {name: x for name, x in own.items() if name not in yaml.safe_load(written)}
        (place / "x.yml").write_text(written + yaml.safe_dump(own | settings))
        self.runs[named] = run(
            "axolotl", ["axolotl", "train", "x.yml"], place, output,
            environment=QUIET, is_expected_to_fail=is_expected_to_fail,
        )  # fmt: skip
        return self.runs[named]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("axolotl"))


@BOTH
def test_a_step(place: Place, tuned: str) -> None:
    done = place.run(tuned)
    for number in (0, 3):
        found = step_errors(place.checkpoint, done, WEIGHT, number=number, **HOW)
        assert max(found.values()) < FLOAT32, found
    check_files(done, (*STEPS, "."))
    losses = [entry["pre_loss"] for entry in check_logs(done, "checkpoint-4")]
    assert losses[-1] < losses[0] - 0.05, losses


def test_the_projector_beside_an_adapter(place: Place) -> None:
    done, weight = place.run("projector"), yaml.safe_load(SETTINGS.text)["pre"]["weight"]
    for number in (0, 3):
        found = step_errors(place.checkpoint, done, weight, number=number, **HOW)
        assert max(found.values()) < FLOAT32, found
    check_projector(done, done.output)
    check_projector(done, done.output / "checkpoint-4")


def test_deepstack(place: Place) -> None:
    """Of Qwen3-VL: its merger and deepstack's three train beside the adapter."""
    checkpoint = make_qwen3(place.folder / "qwen3")
    done = place.run("mergers", data="column", model=checkpoint)
    for number in (0, 3):
        found = step_errors(checkpoint, done, WEIGHT, number=number, image_token=QWEN_IMAGE, **HOW)
        assert max(found.values()) < FLOAT32, found
    check_projector(done, done.output)
    check_copied(done, MERGERS)


@BOTH
def test_micro_batches(place: Place, tuned: str) -> None:
    """axolotl draws an adapter before it sets its seed, so two runs' differ at the start: each is
    compared with the definition at its own weights, and the heads with each other.
    """
    two, one = (place.run(tuned, *sizes) for sizes in ((2, 2), (4, 1)))
    for done, micro_batches in ((two, 2), (one, 1)):
        assert len(done.step(0)["batches"]) == micro_batches
        found = step_errors(place.checkpoint, done, WEIGHT, **HOW)
        assert max(found.values()) < FLOAT32, found
    found = difference(two.step(0)["gradients"], one.step(0)["gradients"])
    assert found["heads"] < FLOAT32, found
    assert tuned == "lora" or found["model"] < FLOAT32, found


@BOTH
def test_resumed(place: Place, tuned: str) -> None:
    whole = place.run(tuned)
    check_resumed(whole, place.run(tuned, resumed=True), whole.step(0)["weights"])


def test_text_alone(place: Place) -> None:
    """Micro-batches of one row each: some have no image, some have two."""
    done = place.run("full", 1, 4, data="chats")
    batches = [batch for number in range(4) for batch in done.step(number)["batches"]]
    images = {int((batch["input_ids"] == 4).sum()) // 4 for batch in batches}
    assert images == {0, 1, 2}, images
    for number in (0, 1):
        found = step_errors(place.checkpoint, done, WEIGHT, number=number, **HOW)
        assert max(found.values()) < FLOAT32, found


@BOTH
def test_the_last_heads(place: Place, tuned: str) -> None:
    """They are beside the last model, and beside the last adapter."""
    from safetensors.torch import load_file

    done = place.run(tuned)
    saved = load_file(done.output / "pre" / "pre_heads.safetensors")
    trained = {n.split("pre_heads.")[1]: x for n, x in done.weights.items() if "pre_heads." in n}
    assert saved.keys() == trained.keys() and len(saved) == 4
    assert all(torch.equal(x, trained[n]) for n, x in saved.items())


def test_a_merged_model(place: Place) -> None:
    """By the method that its page names: axolotl's default leaves out the language model."""
    done = place.run("lora")
    config = done.output.parent / "x.yml"
    merge = ["axolotl", "merge-lora", str(config), "--merge-method", "legacy"]
    run("axolotl", merge, done.output.parent, done.output, environment=QUIET)
    expected = merged_by_hand(place.checkpoint, done)
    path = done.output / "merged"
    model, told = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight.double(), expected[name], atol=1e-6), name


def test_a_setting_that_is_not_known(place: Place) -> None:
    failed = place.run("full", is_expected_to_fail=True, pre={"wieght": 1})
    assert "pre.wieght: not a setting of PRe" in failed.text
