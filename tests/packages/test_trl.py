# SPDX-License-Identifier: Apache-2.0
"""PRe in TRL: its own command by `prereg trl`, at its defaults, in float32 and in its own dtype."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from prereg_kernels.attach.storage import load_heads
from tests.packages.checkpoint import QWEN_IMAGE, make_llava, make_qwen3, write_messages
from tests.packages.compared import (
    COPY,
    FLOAT32,
    check_copied,
    check_files,
    check_logs,
    check_low_precision,
    check_projector,
    check_resumed,
    difference,
    step_errors,
)
from tests.packages.definition import errors, gradients, split
from tests.packages.run import ROOT, Run, folder_of, run
from tests.trainers.test_examples import check_fall

pytestmark = pytest.mark.packages

ANCHOR = "pre_projector"
WEIGHT = 0.3
TUNED: dict[str, dict[str, Any]] = {
    "full": {},
    # TRL's default is a dropout of 0.05, which the definition does not draw
    "lora": {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
}
TUNED["projector"] = TUNED["lora"] | {"lora_modules_to_save": ["multi_modal_projector"]}
MERGERS = ["merger", *(f"deepstack_merger_list.{number}" for number in range(3))]
TUNED["mergers"] = TUNED["lora"] | {"lora_modules_to_save": MERGERS}
REWARDS = """
def length(completions, **_):
    return [float(len(completion[0]["content"])) for completion in completions]
"""
BOTH = pytest.mark.parametrize("tuned", ["full", "lora"])
STEPS = ("checkpoint-2", "checkpoint-4")


class Place:
    """A checkpoint, data, and the runs on them, each of which is started once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = make_llava(folder / "model")
        chats = write_messages(folder / "data", is_split=True)
        pairs = []
        for line in chats.read_text().splitlines():
            row = json.loads(line)
            question, answer = row["messages"]
            worse = {**answer, "content": [{"type": "text", "text": "no idea"}]}
            pair = {"prompt": [question], "chosen": [answer], "rejected": [worse]}
            pairs.append(json.dumps({**pair, "images": row["images"]}))
        chats.with_name("pairs.jsonl").write_text("\n".join(pairs) + "\n")
        # TRL's GRPO (1.16) takes no text alone beside images; and one image each, so that the mean
        # of the micro-batches' means, which L_PRe is there, is that of all visual tokens
        prompts = [x for x in map(json.loads, pairs) if len(x["images"]) == 1]
        prompts = [json.dumps({n: x[n] for n in ("prompt", "images")}) for x in prompts]
        chats.with_name("prompts.jsonl").write_text("\n".join(prompts) + "\n")
        self.data = {"sft": chats} | {
            command: chats.with_name(f"{name}.jsonl")
            for command, name in (("dpo", "pairs"), ("grpo", "prompts"))
        }
        self.runs: dict[str, Run] = {}

    def run(
        self,
        tuned: str,
        rows: int = 2,
        micro_batches: int = 2,
        *,
        command: str = "sft",
        resumed: bool = False,
        has_pre: bool = True,
        model: Path | None = None,
        **settings: Any,
    ) -> Run:
        named = f"{command}-{tuned}-{rows}x{micro_batches}-{resumed}-{has_pre}-{len(settings)}"
        if named in self.runs:
            return self.runs[named]
        place = self.folder / named
        output = place / "out"
        own = {
            "model_name_or_path": str(model or self.checkpoint), "output_dir": str(output),
            "datasets": [{"path": "json", "data_files": str(self.data[command])}],
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches,
            "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
            "report_to": "none", "dtype": "float32", "bf16": False, **TUNED[tuned],
        }  # fmt: skip
        if command == "grpo":
            own |= {"reward_funcs": ["rewards.length"], "num_generations": 2}
            own |= {"max_completion_length": 8}
        if resumed:
            whole = self.run(tuned, rows, micro_batches, command=command)
            own["resume_from_checkpoint"] = str(whole.output / "checkpoint-2")
        program, flags = ["trl", command, "--config", "x.yaml"], []
        if has_pre:
            own["pre"] = {"head_learning_rate": 0.01, "anchor": ANCHOR}
            program, flags = ["prereg_kernels", *program], ["--pre.weight", str(WEIGHT)]
        place.mkdir()
        (place / "x.yaml").write_text(yaml.safe_dump(own | settings))
        (place / "rewards.py").write_text(REWARDS)
        self.runs[named] = run("trl", [*program, *flags], place, output)
        return self.runs[named]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("trl"))


@BOTH
def test_a_step(place: Place, tuned: str) -> None:
    done = place.run(tuned)
    images = [batch["pixel_values"].shape[0] for batch in done.step(0)["batches"]]
    assert sum(images) > 0
    for number in (0, 3):
        found = step_errors(place.checkpoint, done, WEIGHT, number=number, anchor=ANCHOR)
        assert max(found.values()) < FLOAT32, found
    check_files(done, (*STEPS, "."))
    check_logs(done, "checkpoint-4")


def test_the_projector_beside_an_adapter(place: Place) -> None:
    done = place.run("projector")
    for number in (0, 3):
        found = step_errors(place.checkpoint, done, WEIGHT, number=number, anchor=ANCHOR)
        assert max(found.values()) < FLOAT32, found
    check_projector(done, done.output)
    check_projector(done, done.output / "checkpoint-4")


def test_deepstack(place: Place) -> None:
    """Of Qwen3-VL: its merger and deepstack's three train beside the adapter. Its forward takes
    no count of labels, so L_LM is the mean of the micro-batches' means.
    """
    checkpoint = make_qwen3(place.folder / "qwen3")
    rows = datasets.load_dataset("json", data_files=str(place.data["sft"]), split="train")
    rows = rows.cast_column("images", datasets.List(datasets.Image()))  # as data sets of a hub are
    rows.to_parquet(str(place.folder / "images.parquet"))
    data = [{"path": "parquet", "data_files": str(place.folder / "images.parquet")}]
    done = place.run("mergers", model=checkpoint, datasets=data)
    how: dict[str, Any] = {"image_token": QWEN_IMAGE, "is_mean_of_means": True}
    for number in (0, 3):
        found = step_errors(checkpoint, done, WEIGHT, number=number, anchor=ANCHOR, **how)
        assert max(found.values()) < FLOAT32, found
    check_projector(done, done.output)
    check_copied(done, MERGERS)


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
    """Micro-batches of one row each: some have no image, some have two."""
    done = place.run("full", 1, 4)
    batches = [batch for number in range(4) for batch in done.step(number)["batches"]]
    images = {int((batch["input_ids"] == 4).sum()) // 4 for batch in batches}
    assert images == {0, 1, 2}, images
    for number in (0, 1):
        found = step_errors(place.checkpoint, done, WEIGHT, number=number, anchor=ANCHOR)
        assert max(found.values()) < FLOAT32, found


@BOTH
def test_dpo(place: Place, tuned: str) -> None:
    """The gradients are those of TRL's own loss, and of L_PRe over the tokens of both answers."""
    done = place.run(tuned, command="dpo")
    plain = place.run(tuned, command="dpo", has_pre=False)
    step, without = done.step(0), plain.step(0)
    for ours, theirs in zip(step["batches"], without["batches"], strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
    check_sum(place, done, step, without)
    check_files(done, (*STEPS, "."))
    assert check_logs(done, "checkpoint-4")
    check_resumed(done, place.run(tuned, command="dpo", resumed=True), step["weights"])


@BOTH
def test_grpo(place: Place, tuned: str) -> None:
    """As for DPO; its batches are lists of prompts, which cannot be counted before the step."""
    done = place.run(tuned, command="grpo")
    plain = place.run(tuned, command="grpo", has_pre=False)
    step, without = done.step(0), plain.step(0)
    assert len(step["batches"]) == 2
    batches = []
    for ours, theirs in zip(step["batches"], without["batches"], strict=True):
        assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
        parts = {
            "input_ids": ("prompt_ids", "completion_ids"),
            "attention_mask": ("prompt_mask", "completion_mask"),
        }
        joined = {name: torch.cat([ours[n] for n in both], 1) for name, both in parts.items()}
        batches.append({**joined, "pixel_values": ours["pixel_values"]})
    check_sum(place, done, {**step, "batches": batches}, without)
    check_files(done, (*STEPS, "."))
    assert check_logs(done, "checkpoint-4")


def check_sum(place: Place, done: Run, step: dict[str, Any], without: dict[str, Any]) -> None:
    """The gradients are those of TRL's own loss, without PRe, and those of the term."""
    term = gradients(place.checkpoint, done, step, WEIGHT, anchor=ANCHOR, has_lm_loss=False)
    own = without["gradients"]
    expected = {n: own.get(n, 0) + term.get(n, 0) for n in step["gradients"]}
    found = errors(step["gradients"], expected)
    assert max(found.values()) < FLOAT32, found
    assert any(x.abs().max() > 1e-4 for x in split(term)[0].values())  # PRe's part is seen


def test_the_page_s_file(place: Place) -> None:
    """docs/trainers/trl.md's, letter for letter but for the model's name, by the page's command."""
    folder = place.folder / "page"
    folder.mkdir()
    page = (ROOT / "docs" / "trainers" / "trl.md").read_text()
    [file] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert file.count("MODEL ") == 1
    (folder / "sft.yaml").write_text(file.replace("MODEL ", f"{place.checkpoint} "))
    (folder / "train.jsonl").write_bytes(place.data["sft"].read_bytes())
    [command] = re.findall(r"^prereg (trl sft .*)$", page, re.MULTILINE)
    on_a_cpu = ["--use_cpu", "true", "--report_to", "none"]
    command_line = ["prereg_kernels", *shlex.split(command, comments=True), *on_a_cpu]
    done = run("trl", command_line, folder, folder / "out")
    settings = load_heads(done.output).config
    assert (settings["weight"], settings["head_learning_rate"]) == (0.3, 1e-3)
    start = done.step(0)["weights"]
    moved = {n for n, x in done.weights.items() if not torch.equal(x, start[n])}
    adapted, heads = split({name: done.weights[name] for name in moved})
    assert len(heads) == 4 and len(adapted) > 8
    whole = {name for name in adapted if COPY in name}
    assert len(whole) == 4 and all("multi_modal_projector" in name for name in whole)
    language = [name for name in adapted if name not in whole]
    assert all(re.search(r"language_model.*[qv]_proj.*lora_", name) for name in language)
    check_files(done, (".",))
    check_projector(done, done.output)


def test_bfloat16(place: Place) -> None:
    """TRL's default, for which it wants to be told of a CPU."""
    settings: dict[str, Any] = {"bf16": True, "use_cpu": True}
    two, one = (place.run("full", *sizes, **settings) for sizes in ((2, 2), (4, 1)))
    check_low_precision(place.checkpoint, two, one, WEIGHT, torch.bfloat16, anchor=ANCHOR)


def test_the_command_without_a_known_setting(place: Place) -> None:
    folder = place.folder / "wrong"
    folder.mkdir()
    (folder / "x.yaml").write_text("pre: {wieght: 0.3}\n")
    command = ["prereg_kernels", "trl", "sft", "--config", "x.yaml"]
    failed = run("trl", command, folder, folder / "out", is_expected_to_fail=True)
    assert failed.text.strip().splitlines()[-1].startswith("prereg: pre.wieght: not a setting")
    assert "Traceback" not in failed.text


def test_the_example(tmp_path: Path) -> None:
    paths = (folder_of("trl"), ROOT, ROOT / "examples")
    own = {"PYTHONPATH": ":".join(map(str, paths)), "TMPDIR": str(tmp_path)}
    done = run("trl", ["sft_trainer"], tmp_path, tmp_path, environment=own)
    check_fall([x for x in done.text.splitlines() if x.startswith("pre_loss ")])
