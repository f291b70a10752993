# SPDX-License-Identifier: Apache-2.0
"""A run small enough for tests: seconds, tower included."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from prereg_kernels.demo import stages
from prereg_kernels.demo.config import PReSettings, RunConfig, StageConfig, TowerConfig
from prereg_kernels.demo.model.llava import ModelConfig

MODEL = ModelConfig(
    width=32, tower_layers=1, decoder_layers=2, heads=2, tower_mlp=32, decoder_mlp=32
)
TOWER = TowerConfig(steps=2, batch=4, warmup=1)


def tiny_run(**overrides: Any) -> RunConfig:
    """Two stages of 3 and 5 steps, PRe in the second."""
    settings: dict[str, Any] = {
        "model": MODEL,
        "tower": TOWER,
        "stages": (
            StageConfig("projector", steps=3, warmup=1, trainable=("projector",)),
            StageConfig("all", steps=5, warmup=1, pre=True),
        ),
        "pre": PReSettings(layer=1, token_fraction=0.5),  # a resumed run has to draw the same
        "questions_per_scene": 4,
        "micro_batch": 2,
        "accumulation": 2,
        "checkpoint_every": 2,
    }
    return RunConfig(**{**settings, **overrides})


def signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """SIGTERM while the loop is in its `number`-th step."""
    original, calls = stages._step, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(stages, "_step", interrupted)


def as_version_0_1_0(run: Path) -> None:
    """Take from a run what that version did not write: marks, lists of files, checksums."""
    for name in (".prereg", ".prereg.lock"):
        (run / name).unlink(missing_ok=True)
    for path in run.glob("checkpoints/*/prereg_manifest.json"):
        path.unlink()
    for file in run.glob("checkpoints/*/pre/pre_heads.safetensors"):
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["prereg"])
            heads = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        about.pop("sha256", None)
        save_file(heads, file, {"format": "pt", "prereg": json.dumps(about)})
