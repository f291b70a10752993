# SPDX-License-Identifier: Apache-2.0
"""The stage on descriptions in words: what it trains, what it leaves alone, and that it resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prereg_kernels.demo import stages
from prereg_kernels.demo.config import RunConfig, StageConfig
from prereg_kernels.demo.data.packing import build_tokenizer
from prereg_kernels.demo.data.scenes import SceneConfig
from prereg_kernels.demo.loop import TrainingInterrupted, train
from prereg_kernels.demo.metrics import read_metrics
from prereg_kernels.demo.model.llava import build_model
from tests.demo.tiny import MODEL, signal_in_step, tiny_run


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tower for all runs here."""
    return tmp_path_factory.mktemp("towers")


TEXT = StageConfig("text", steps=4, lr=1e-2, warmup=1, trainable=("llm",), data="text")


def with_text() -> RunConfig:
    return tiny_run(stages=(TEXT, *tiny_run().stages))


def test_a_text_stage_trains_the_decoder_alone_and_shifts_no_scene(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, torch.Tensor]]] = []
    original = stages._step

    def watched(model, optimizer, batches, *rest):  # type: ignore[no-untyped-def]
        seen.append(batches)
        return original(model, optimizer, batches, *rest)

    monkeypatch.setattr(stages, "_step", watched)
    quiet = {"cache_dir": cache_dir, "progress": False, "tensorboard": False}
    before = replace(tiny_run(), stages=(replace(TEXT, steps=4),))
    alone = train(before, tmp_path / "text", **quiet)
    start = build_model(MODEL, SceneConfig(), build_tokenizer(SceneConfig()), before.seed)
    projector = alone.model.model.multi_modal_projector.state_dict()
    for name, value in start.model.multi_modal_projector.state_dict().items():
        assert torch.equal(value, projector[name])
    changed = alone.model.model.language_model.layers[0].mlp.up_proj.weight
    assert not torch.equal(changed, start.model.language_model.layers[0].mlp.up_proj.weight)
    assert all("pixel_values" not in batch for batches in seen for batch in batches)
    assert len(seen) == 4

    runs = {}
    for name, config in (("with", with_text()), ("without", tiny_run())):
        seen.clear()
        train(config, tmp_path / name, **quiet)
        runs[name] = list(seen)
    assert len(runs["with"]) == 12
    for ours, theirs in zip(runs["with"][4:], runs["without"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
    lines = read_metrics(tmp_path / "with")
    assert [line["stage"] for line in lines] == [0] * 4 + [1] * 3 + [2] * 5


def test_the_loss_on_descriptions_falls(tmp_path: Path, cache_dir: Path) -> None:
    stage = replace(TEXT, steps=60, warmup=5)
    config = tiny_run(stages=(stage,), micro_batch=8, checkpoint_every=1000)
    train(config, tmp_path, cache_dir=cache_dir, progress=False, tensorboard=False)
    losses = [line["lm_loss"] for line in read_metrics(tmp_path)]
    assert sum(losses[:5]) / 5 > 3.0 and sum(losses[-5:]) / 5 < 1.8


@pytest.mark.parametrize("after_step", [2, 4, 6])
def test_a_text_stage_resumes_bitwise(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, after_step: int
) -> None:
    """Stopped within it, at its end, and in the stage after it."""
    quiet = {"cache_dir": cache_dir, "progress": False, "tensorboard": False}
    train(with_text(), tmp_path / "unbroken", **quiet)
    signal_in_step(monkeypatch, after_step)
    with pytest.raises(TrainingInterrupted, match=f"stopped after step {after_step}; saved"):
        train(with_text(), tmp_path / "stopped", **quiet)
    monkeypatch.undo()
    train(with_text(), tmp_path / "stopped", **quiet)
    one, other = (
        load_file(tmp_path / name / "checkpoints" / "step-00000012" / "model.safetensors")
        for name in ("unbroken", "stopped")
    )
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    losses = [
        [line["lm_loss"] for line in read_metrics(tmp_path / name)]
        for name in ("unbroken", "stopped")
    ]
    assert len(losses[0]) == 12 and losses[0] == losses[1]
