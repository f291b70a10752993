# SPDX-License-Identifier: Apache-2.0
"""Presets, and which worker gets which device."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prereg_kernels.cli import demo
from prereg_kernels.cli.demo import _devices, load_preset, load_sweep
from prereg_kernels.demo.config import CONTROLS
from prereg_kernels.demo.data.questions import COMMON_FAMILIES
from prereg_kernels.demo.sweep.sweep import points


def test_the_large_preset_is_large() -> None:
    config = load_preset("scenes-gpu")
    run = config.run
    assert run.scenes.patches >= 144 and run.scenes.max_digits == 12
    assert run.model.decoder_layers >= 12 and run.model.width > 96
    assert config.seeds == 5 and config.device == "cuda" and run.precision == "bf16"
    assert load_preset("scenes").device == "cpu"


def test_the_text_preset_adds_a_stage_and_nothing_else() -> None:
    plain, text = load_preset("scenes-gpu"), load_preset("scenes-gpu-text")
    first, *rest = text.run.stages
    assert first.data == "text" and first.trainable == ("llm",)
    assert replace(text, run=replace(text.run, stages=tuple(rest))) == plain


@pytest.mark.parametrize("name", ["scenes", "scenes-gpu"])
def test_sweeps_are_of_their_preset(name: str) -> None:
    sweep, preset = load_sweep(name), load_preset(name)
    own = {"seeds": preset.seeds, "first_seed": preset.first_seed, "transfer": preset.transfer}
    assert replace(sweep.experiment, **own) == preset
    assert sweep.experiment.seeds == 5 and sweep.transfer
    other = set(CONTROLS) - {preset.run.pre.anchor}
    anchors = {*other, CONTROLS[preset.run.pre.anchor]}
    assert {f"anchor {anchor}" for anchor in anchors} <= {p.name for p in points(sweep)}
    assert sweep.long_tail is None or sweep.long_tail.keys() > set(COMMON_FAMILIES)


def test_a_sweep_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    for text, message in (
        ("weights: [1]", r"sweep\.yaml: preset: expected a preset's name or a YAML file, got None"),
        ("preset: nope", r"sweep\.yaml: --preset: expected one of scenes, .*got nope"),
        ("{preset: scenes, seeds: 0}", r"sweep\.yaml: experiment\.seeds: expected at least 1"),
        ("{preset: scenes, weights: 2}", r"sweep\.yaml: weights: expected a list, got 2"),
        ("- preset", r"sweep\.yaml: expected a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_sweep(str(path))


def _arguments(device: str | None = None, workers: int | None = None) -> argparse.Namespace:
    return argparse.Namespace(device=device, workers=workers)


def test_a_preset_for_a_gpu_says_so_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device: the preset is meant for cuda, .*--device cpu"):
        _devices("cuda", _arguments())
    assert _devices("cuda", _arguments("cpu", 2)) == ["cpu", "cpu"]


def test_a_worker_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(demo, "_usable", torch.device)
    assert _devices("cuda", _arguments()) == ["cuda:0", "cuda:1"]
    assert _devices("cuda", _arguments(workers=3)) == ["cuda:0", "cuda:1", "cuda:0"]
    assert _devices("cpu", _arguments("cuda")) == ["cuda:0", "cuda:1"]
    assert _devices("cuda", _arguments("cuda:1")) == ["cuda:1"]
    assert _devices("cpu", _arguments(workers=4)) == ["cpu"] * 4  # what it is meant for
