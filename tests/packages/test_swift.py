"""PRe in ms-swift: `swift sft` with the plugin that ships, at its defaults, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prereg_kernels.cli.launch import SWIFT_PLUGIN
from tests.packages.checkpoint import QWEN_IMAGE, make_llava, make_qwen, write_messages
from tests.packages.compared import (
    FLOAT32,
    check_files,
    check_logs,
    check_resumed,
    difference,
    step_errors,
)
from tests.packages.run import Run, run

pytestmark = pytest.mark.packages

WEIGHT = 0.3
BOTH = pytest.mark.parametrize("tuned", ["full", "lora"])
STEPS = ("checkpoint-2", "checkpoint-4")
KINDS = {"llava": "llava1_5_hf", "qwen": "qwen2_5_vl"}


class Place:
    """Checkpoints, data, and the runs on them, each of which is started once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = {
            "llava": make_llava(folder / "llava"), "qwen": make_qwen(folder / "qwen"),
        }  # fmt: skip
        self.data = write_messages(folder / "data", is_split=False)
        self.runs: dict[str, Run] = {}

    def run(
        self,
        tuned: str,
        rows: int = 2,
        micro_batches: int = 2,
        model: str = "llava",
        resumed: bool = False,
        ranks: int = 1,
        *flags: str,
    ) -> Run:
        named = f"{tuned}-{rows}x{micro_batches}-{model}-{resumed}-{ranks}{''.join(flags)}"
        if named in self.runs:
            return self.runs[named]
        place = self.folder / named
        output = place / "out"
        pre = {"pre": {"weight": WEIGHT, "head_learning_rate": 0.01}}
        command = [
            "swift", "sft", "--external_plugins", str(SWIFT_PLUGIN),
            "--model_kwargs", json.dumps(pre),
            "--model", str(self.checkpoints[model]), "--model_type", KINDS[model],
            "--template", KINDS[model], "--tuner_type", tuned, "--torch_dtype", "float32",
            "--dataset", str(self.data), "--output_dir", str(output), "--add_version", "false",
            "--per_device_train_batch_size", str(rows), "--check_model", "false",
            "--gradient_accumulation_steps", str(micro_batches), "--max_steps", "4",
            "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3",
            "--lora_dropout", "0", *flags,
        ]  # fmt: skip
        if resumed:
            whole = self.run(tuned, rows, micro_batches, model)
            command += ["--resume_from_checkpoint", str(whole.output / "checkpoint-2")]
        variables = {"NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}
        self.runs[named] = run("swift", command, place, output, environment=variables)
        return self.runs[named]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("swift"))


@BOTH
def test_a_step(place: Place, tuned: str) -> None:
    done = place.run(tuned)
    for number in (0, 3):
        found = step_errors(place.checkpoints["llava"], done, WEIGHT, number=number)
        assert max(found.values()) < FLOAT32, found
    check_files(done, STEPS)
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


@BOTH
def test_a_template_that_takes_the_ids(place: Place, tuned: str) -> None:
    """Qwen2.5-VL's makes embeddings of them before the model is called."""
    done = place.run(tuned, model="qwen")
    for number in (0, 3):
        found = step_errors(
            place.checkpoints["qwen"], done, WEIGHT, number=number, image_token=QWEN_IMAGE
        )
        assert max(found.values()) < FLOAT32, found
    check_files(done, STEPS)


def test_ranks(place: Place) -> None:
    done = place.run("lora", 1, 2, ranks=2)
    found = step_errors(place.checkpoints["llava"], done, WEIGHT, ranks=2)
    assert max(found.values()) < FLOAT32, found
    check_files(done, STEPS)
