# SPDX-License-Identifier: Apache-2.0
"""`prereg estimate` answers quickly, and says in a line what is wrong."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from prereg_kernels.cli.estimate import structure_of
from prereg_kernels.estimate import shipped
from prereg_kernels.estimate.settings import Settings
from tests.cli.run import Command, unread
from tests.zoo import sample

CLUSTER = ("--gpus", "64", "--parallel", "zero3", "--checkpointing", "--gpu", "h200")


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_model_is_answered_at_once(name: str, tmp_path: Path) -> None:
    """In less than 5 s of the processor, without transformers, for 64 GPUs."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "prereg_kernels",
        "estimate",
        name,
        *CLUSTER,
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "prereg_kernels.estimate.shipped" in imported
    assert not {n for n in imported if n.split(".")[0] in ("transformers", "matplotlib")}
    assert done.stdout.startswith("PRe adds ")
    assert "all-gather of weights" in done.stdout


def test_json_and_picture(tmp_path: Path, prereg_here: Command) -> None:
    flags = ("--json", "--picture", "memory.svg")
    done = prereg_here("estimate", "llava-1.5-7b", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == 7_063_427_072
    assert found["flops"]["pre"] == pytest.approx(16 * 576 * 6 * 2 * 4096**2)
    assert found["pre"]["layer"] == 16
    assert found["peak"]["fused"]["phase"] == "loss"
    picture = (tmp_path / "memory.svg").read_text()
    assert all(word in picture for word in ("PRe, layer 16", "optimizer", "with eager PRe"))


def test_a_model_of_one_s_own(tmp_path: Path, prereg_here: Command) -> None:
    model = sample("llava").model
    (tmp_path / "mine").mkdir()
    model.config.save_pretrained(tmp_path / "mine")
    done = prereg_here("estimate", "mine/config.json", "--gpu", "cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(found["error"]) == {"seconds", "bytes"}


def test_a_step_in_float32(tmp_path: Path, prereg_here: Command) -> None:
    """On a CPU: twice the bytes of what is kept, and no copies of the weights."""
    sample("llava").model.config.save_pretrained(tmp_path)
    peaks = {}
    for weights in ("bfloat16", "float32"):
        flags = ("--gpu", "cpu", "--weights", weights, "--images-per-step", "512", "--json")
        done = prereg_here("estimate", str(tmp_path), *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        peaks[weights] = json.loads(done.stdout)["peak"]["fused"]["bytes"]
    for kind in ("weights", "activations"):
        assert 1.6 < peaks["float32"][kind] / peaks["bfloat16"][kind] <= 2, kind


@pytest.mark.parametrize("weights", ("bfloat16", "float32"))
@pytest.mark.parametrize("saved", (torch.float16, torch.float32))
def test_what_a_model_was_saved_in_does_not_matter(
    saved: torch.dtype, weights: str, tmp_path: Path
) -> None:
    """transformers writes the dtype into each part of a config. A step of a model that was saved
    in float32 was one of float32, with twice the bytes, where one of bfloat16 was asked for."""
    settings = Settings(gpu="cpu", weights=weights)
    config = sample("qwen2_5_vl").model.config
    config.save_pretrained(tmp_path / "plain")
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config, dtype=saved)
    made.config.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["text_config"]["dtype"] == str(saved).removeprefix("torch.")
    expected = structure_of(str(tmp_path / "plain"), settings)
    found = structure_of(str(tmp_path / "saved"), settings)
    assert replace(found, name=expected.name) == expected
    assert found.itemsize == {"bfloat16": 2, "float32": 4}[weights]


def test_a_model_without_visual_tokens_says_why(tmp_path: Path) -> None:
    """It said that there was no processor for a batch."""
    sample("mllama").model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cross-attention"):
        structure_of(str(tmp_path), Settings())


@pytest.mark.parametrize(
    "command",
    (
        "estimate llava-1.5-7b --json",
        "doctor",
        "doctor .",
        "demo --settings",
        "sweep --preset scenes --settings",
    ),
)
def test_a_reader_who_has_enough(command: str, tmp_path: Path) -> None:
    sample("llava").model.config.save_pretrained(tmp_path)
    done = unread(*command.split(), cwd=tmp_path)
    assert not done.stderr and not done.returncode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent",), "model: expected a config.json"),
        (("llava-1.5-7b", "--gpus", "0"), "--gpus: expected an integer of at least 1, got 0"),
        (("llava-1.5-7b", "--gpus", "x"), "argument --gpus: invalid int value"),
        (("llava-1.5-7b", "--gpu", "h1"), "argument --gpu: invalid choice"),
        (("llava-1.5-7b", "--layer", "33"), "--layer: the decoder has 32 layers"),
        (("llava-1.5-7b", "--tokens", "-1"), "--tokens: expected an integer of at least 1"),
        (("llava-1.5-7b", "--token-fraction", "2"), "--token-fraction: expected a number"),
        (("llava-1.5-7b", "--train", "head"), "--train: expected some of tower"),
        (("llava-1.5-7b", "--gpus", "8", "--images-per-step", "4"), "--images-per-step: expected"),
        (
            ("llava-1.5-7b", "--gpu", "cpu", "--weights", "float32"),
            "--weights: expected bfloat16 w",
        ),
        (
            ("llava-1.5-7b", "--gpus", "12", "--parallel", "tp"),
            "--gpus: expected a multiple of 8, or fewer, with --parallel tp, got 12",
        ),
        (("llava-1.5-7b", "--picture", "x.gif"), "--picture: expected a .png or .svg, got x.gif"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], message: str, tmp_path: Path, prereg_here: Command
) -> None:
    done = prereg_here("estimate", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"prereg: {message}")
    assert done.stderr.count("\n") == 1 and not done.stdout
