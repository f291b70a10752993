# SPDX-License-Identifier: Apache-2.0
"""What a run shows of itself: speed, the gradients of both losses, held-out images, W&B."""

from __future__ import annotations

import json
import math
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from prereg_kernels.checkup import checkup
from prereg_kernels.checkup.images.datasets import ImageFolder
from prereg_kernels.checkup.images.image_batches import ImageBatches
from prereg_kernels.checkup.loading import load
from prereg_kernels.train import held_out
from prereg_kernels.train.config import load_config
from prereg_kernels.train.facts import Facts
from prereg_kernels.train.flops import PEAKS, StepFlops, peak_flops, peak_of
from prereg_kernels.train.parts import set_trainable
from prereg_kernels.train.run import train
from prereg_kernels.train.throughput import TIMED, Throughput
from prereg_kernels.train.trainer import RecipeTrainer
from tests.train.places import make_place, metrics, settings, write
from tests.train.test_run import Crash, run, same, weights, with_callback

ONE_STAGE: dict[str, Any] = {"stages__0__max_steps": 1, "stages__1__max_steps": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def test_speed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, visual tokens and images of each step, and no MFU."""
    seen: list[tuple[int, int, int]] = []
    step = RecipeTrainer.training_step

    def count(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
        shown = (int(inputs["attention_mask"].sum()), int((ids == 4).sum()))
        seen.append((*shown, 0 if pixels is None else len(pixels)))
        return step(self, model, inputs, *rest, **options)

    monkeypatch.setattr(RecipeTrainer, "training_step", count)
    out = run(place, tmp_path / "out", **ONE_STAGE)
    lines = metrics(out, "align") + metrics(out, "tune")
    assert len(seen) == len(lines) == 5
    names = ("tokens_per_second", "visual_tokens_per_second", "images_per_second")
    for line, counts in zip(lines, seen, strict=True):
        found = [line[name] / line["steps_per_second"] for name in names]
        assert found == pytest.approx(counts, rel=1e-4)
        assert "mfu" not in line
    assert 0.01 < lines[0]["peak_memory_gib"] < 100
    watched = lines[1]  # the first step of the stage with PRe
    assert watched["pre_share"] == pytest.approx(
        watched["pre_seconds"] * watched["steps_per_second"], rel=1e-6
    )
    assert 0 < watched["pre_share"] < 1
    assert {"lm_hidden_grad_norm", "pre_hidden_grad_norm"} < watched.keys()


def test_what_is_no_part_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two logs, 2 s and 3 s of steps, and 8 s of saving between them."""
    clock = iter([10.0, 12.0, 20.0, 23.0, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Throughput(make_model(), False)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )  # fmt: skip
    facts = Facts(("a",), tokens=50, visual_tokens=20, labels=5, images=2, pixels=1536)
    speed.begin(7)
    speed.add(facts)
    with speed.paused():
        pass
    speed.begin(8)
    speed.add(facts)
    figures = speed.take(9, accelerator, 0.5)
    assert figures["tokens_per_second"] == 100 / 5 and figures["images_per_second"] == 4 / 5
    assert figures["steps_per_second"] == 2 / 5 and figures["pre_share"] == 0.5 / 2.5
    speed.begin(9)
    speed.add(facts)
    assert speed.take(10, accelerator, None)["visual_tokens_per_second"] == 20


def make_model() -> Any:
    """A LLaVA whose tower has a token a patch, all of whose layers are used."""
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=8, vision_use_head=False,
        ),
        text_config=LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            vocab_size=90,
        ),
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_token_id=4,
        image_seq_length=4,
    ))  # fmt: skip


@pytest.mark.parametrize("parts", (
    ("projector",), ("projector", "llm"), ("llm",), ("tower", "projector", "llm"),
))  # fmt: skip
def test_flops(parts: tuple[str, ...]) -> None:
    """Those that torch counts in a step, but for the angles of the positions."""
    model = make_model().train()
    set_trainable(model, parts)
    ids = torch.full((2, 10), 7)
    ids[:, :4] = 4
    pixels = torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    assert not any("attention" in op.__name__ for op in counts)  # on CPUs it counts none of it
    angles = 2 * 10 * 6  # positions by frequencies
    assert StepFlops(model).of(20, 8, pixels.numel()) == sum(counts.values()) - angles


def test_peaks() -> None:
    """By the device's name; of others, and of CPUs, nothing is made up."""
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA GeForce GTX 1080") is None
    assert peak_flops(torch.device("cpu")) is None
    assert all(1e14 < peak < 1e16 for peak in PEAKS.values())


def test_a_led_weight_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, with its schedule, the controller's weight and the figures."""
    pre = {
        "weight": 0.5, "watch_steps": 2, "gradient_ratio": 0.1, "weight_schedule": "cosine",
        "weight_warmup_steps": 2,
    }  # fmt: skip
    whole = run(place, tmp_path / "whole", pre=pre)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        with_callback(patch, Crash(5))
        run(place, tmp_path / "out", pre=pre)
    out = run(place, tmp_path / "out", pre=pre)
    assert same(weights(out), weights(whole))
    lines = [
        [
            {n: x for n, x in line.items() if n not in (*TIMED, "epoch")}
            for line in metrics(x, "tune")
        ]
        for x in (whole, out)
    ]
    assert lines[0] == lines[1]
    led = [line["pre_weight"] for line in lines[0]]
    assert led[:2] == [0.0, 0.25]
    assert led[4] != pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 2 / 5)), rel=1e-2)


@pytest.fixture(scope="module")
def pictures(place: Path) -> Path:
    """Folders of two classes, and masks of two objects, of images that the model has not seen."""
    generator = np.random.default_rng(0)
    for number in range(16):
        kind = ("dark", "light")[number % 2]
        pixels = generator.integers(0, 128, (16, 16, 3)) + 127 * (number % 2)
        (place / "held_out" / kind).mkdir(parents=True, exist_ok=True)
        (place / "masks" / kind).mkdir(parents=True, exist_ok=True)
        name = f"{kind}/{number}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(place / "held_out" / name)
        mask = np.ones((16, 16), np.uint8)
        mask[:, 8:] = 2
        Image.fromarray(mask).save(place / "masks" / name)
    records = [
        {"image": path.relative_to(place / "held_out").as_posix(), "conversations": [
            {"from": "human", "value": "<image>\nIs it light?"},
            {"from": "gpt", "value": "yes" if path.parent.name == "light" else "no"},
        ]}
        for path in sorted((place / "held_out").rglob("*.png"))
    ]  # fmt: skip
    (place / "held_out.json").write_text(json.dumps(records))
    return place


def with_checkup(place: Path, **changes: Any) -> dict[str, Any]:
    folders = {"images": str(place / "held_out"), "masks": str(place / "masks")}
    return {"steps": 2, **folders, **changes}


def test_a_checkup_changes_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, of a run that draws numbers, whatever the measures draw."""
    changes: dict[str, Any] = {
        **ONE_STAGE, "lora": {"r": 4, "lora_dropout": 0.5}, "trainer__logging_steps": 3,
    }  # fmt: skip
    plain = run(pictures, tmp_path / "plain", **changes)
    features, modes = held_out.visual_features, list[bool]()

    def drawing(model: Any, *args: Any) -> Any:
        torch.rand(5), np.random.rand(5), random.random()
        modes.append(model.training)
        return features(model, *args)

    monkeypatch.setattr(held_out, "visual_features", drawing)
    checked = run(pictures, tmp_path / "checked", checkup=with_checkup(pictures), **changes)
    assert same(weights(plain), weights(checked))
    assert modes and not any(modes)
    lines = [json.loads(line) for line in (checked / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "checkup_probe/layer_2" in line]
    assert steps == [0, 1, 0, 2, 4]


@pytest.mark.parametrize("is_asked", (False, True))
def test_a_checkup_measures_as_the_command(pictures: Path, tmp_path: Path, is_asked: bool) -> None:
    """The last one is `prereg checkup`'s of the model that was saved."""
    data = {"data": str(pictures / "held_out.json")} if is_asked else {}
    out = run(
        pictures, tmp_path / "out", checkup=with_checkup(pictures, **data), stages=[
            {"name": "tune", "trainable": ["projector", "llm"], "max_steps": 2},
        ], trainer__report_to="tensorboard",
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "checkup_cohesion/layer_2" in line][-1]
    samples = ImageFolder(pictures / "held_out", masks=pictures / "masks", background=(0, 255))
    results = checkup(load(out).model, ImageBatches(load(out), samples), tmp_path / "checkup")
    names = {"probe": "image: class", "cohesion": "cohesion", "coupling": "coupling"}
    for name, curve in names.items():
        for layer in (0, 2, 4):
            expected = results.curves[curve][layer].value
            assert last[f"checkup_{name}/layer_{layer}"] == pytest.approx(expected, rel=1e-4)
    assert list((out / "tensorboard" / "tune").iterdir())
    assert not AutoModelForImageTextToText.from_pretrained(out).training


def test_checkups_are_checked(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkup\.steps: expected"):
        run(pictures, tmp_path / "a", checkup=with_checkup(pictures, steps=0))
    with pytest.raises(ValueError, match=r"checkup\.data: expected a file, or images"):
        run(pictures, tmp_path / "b", checkup={"steps": 2})
    with pytest.raises(ValueError, match="images: expected a directory"):
        run(pictures, tmp_path / "c", checkup={"images": str(tmp_path / "absent")})


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A stand-in, which keeps its runs."""
    runs: list[dict[str, Any]] = []
    module: Any = types.ModuleType("wandb")
    module.__spec__ = SimpleNamespace(loader=None)
    module.run = None

    def init(**options: Any) -> None:
        runs.append({"name": options.get("name"), "logged": []})
        module.run = SimpleNamespace(_label=lambda **_: None, summary={})

    def finish() -> None:
        module.run = None

    class Config(dict[str, Any]):
        def update(self, *args: Any, **options: Any) -> None:
            pass

    module.init, module.finish, module.config = init, finish, Config()
    module.define_metric = lambda *args, **options: None
    module.log = lambda figures, **options: runs[-1]["logged"].append(figures)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        part: Any = types.ModuleType(name)
        part.ConfigError = RuntimeError
        monkeypatch.setitem(sys.modules, name, part)
    yield runs


def test_wandb(place: Path, tmp_path: Path, wandb: list[dict[str, Any]]) -> None:
    """A run a stage, which has the figures of metrics.jsonl."""
    out = run(place, tmp_path / "out", trainer__report_to="wandb", **ONE_STAGE)
    assert [x["name"] for x in wandb] == ["out-align", "out-tune"]
    for stage, found in zip(("align", "tune"), wandb, strict=True):
        losses = [x["train/lm_loss"] for x in found["logged"] if "train/lm_loss" in x]
        assert losses == [line["lm_loss"] for line in metrics(out, stage)]
    assert "train/hidden_grad_cosine" in wandb[1]["logged"][0]


def test_wandb_has_to_be_there(place: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", settings(place, tmp_path / "o", trainer__report_to="wandb"))
    with pytest.raises(ValueError, match=r"trainer\.report_to: wandb is not installed"):
        train(load_config(path))
