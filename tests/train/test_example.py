# SPDX-License-Identifier: Apache-2.0
"""What `make train-example` trains, in a few steps: against the definition and the baseline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch
import transformers.trainer
import yaml

from prereg_kernels.train.assemble import assemble
from prereg_kernels.train.config import load_config
from prereg_kernels.train.models import load_processor
from prereg_kernels.train.run import train
from tests.packages.definition import errors, gradients
from tests.packages.inside import recorder
from tests.packages.run import Run

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = (
    "--stages.0.max_steps", "1", "--stages.1.max_steps", "2", "--trainer.report_to", "none",
    "--trainer.per_device_train_batch_size", "4",
)  # fmt: skip


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's folder before training: models, images, questions."""
    photographs, folder = load("photographs"), tmp_path_factory.mktemp("photographs")
    photographs.write_data(folder)
    text = (folder / "train.json").read_text()
    photographs.write_clip(folder / "clip")
    photographs.write_llama(folder / "llama", text)
    photographs.write_qwen(folder / "qwen", text)
    assemble(str(folder / "clip"), str(folder / "llama"), folder / "llava")
    return folder


def run(place: Path, out: Path, model: str, *flags: str) -> Run:
    """The example's settings in a few steps, which are recorded: those of the second stage stay."""
    data = ("--data.0.path", str(place / "train.json"), "--data.0.images", str(place / "images"))
    config = load_config(
        EXAMPLES / "photographs.yaml",
        ["--model", str(place / model), "--out", str(out), *data, *FEW, *flags],
    )
    recorded = out.with_name(f"{out.name}-recorded")
    trainer, accelerator = transformers.trainer.Trainer, accelerate.Accelerator
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORDED", str(recorded))
        for name in ("training_step", "train", "__init__"):  # so that they are put back
            patch.setattr(trainer, name, getattr(trainer, name))
        patch.setattr(accelerator, "clip_grad_norm_", accelerator.clip_grad_norm_)
        recorder.install(transformers.trainer)
        train(config)
    return Run(recorded, out, "")


@pytest.fixture(scope="module")
def llava(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(place, tmp_path_factory.mktemp("llava") / "out", "llava")


def check_gradients(done: Run, model: Path) -> None:
    token = load_processor(model).image_token_id
    start = done.output / "stages/align/model"
    for number in range(2):
        step = done.step(number)
        expected = gradients(start, done, step, 0.5, image_token=token)
        assert max(errors(step["gradients"], expected).values()) < 1e-5


def test_a_step_s_gradients_are_the_definition_s(place: Path, llava: Run) -> None:
    check_gradients(llava, place / "llava")


def test_those_of_qwen_too(place: Path, tmp_path: Path) -> None:
    check_gradients(run(place, tmp_path / "out", "qwen"), place / "qwen")


def test_the_twin_differs_in_nothing_but_pre(place: Path, llava: Run, tmp_path: Path) -> None:
    """`--pre null`: the same settings, weights at the start, batches in each step."""
    twin = run(place, tmp_path / "baseline", "llava", "--pre", "null")
    a, b = (yaml.safe_load((x.output / "config.yaml").read_text()) for x in (llava, twin))
    assert a.keys() == b.keys() and {name for name in a if a[name] != b[name]} == {"pre", "out"}
    assert b["pre"] is None
    for number in range(2):
        assert same_batches(llava.step(number)["batches"], twin.step(number)["batches"])
    start, other = llava.step(0)["weights"], twin.step(0)["weights"]
    assert all("pre_heads." in name for name in start.keys() ^ other.keys())
    assert len(start) > len(other) and all(start[name].equal(x) for name, x in other.items())


def same_batches(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )
