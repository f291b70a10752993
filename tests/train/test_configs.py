# SPDX-License-Identifier: Apache-2.0
"""The files of configs/, on models of the paper's sizes without weights, and on made-up data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from prereg_kernels import apply_pre
from prereg_kernels.train.config import load_config
from prereg_kernels.train.dry_run import describe_run
from prereg_kernels.train.models import model_on_meta

CONFIGS = Path(__file__).parents[2] / "configs"
SETTINGS = sorted(path.stem for path in CONFIGS.glob("*-*.yaml"))
# As their config.json on the hub have them; the counts of numbers are those that the hub shows.
TOWERS: dict[str, tuple[Any, int]] = {
    "clip": (
        CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=336, patch_size=14, projection_dim=768,
        ),
        303_507_456,
    ),
    "siglip2": (
        SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
            image_size=384, patch_size=14,
        ),
        428_225_600,
    ),
}  # fmt: skip
DECODERS: dict[str, tuple[Any, int, int]] = {
    "vicuna-7b": (
        LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, vocab_size=32000,
        ),
        6_738_415_616,
        16,
    ),
    "qwen2.5-7b": (
        Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
        ),
        7_615_616_512,
        14,
    ),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the settings name, as a working directory has it: 1,000 and 300 samples of one image."""
    monkeypatch.chdir(tmp_path)
    for path, count in (("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", 1000),
                        ("llava_v1_5_mix665k.json", 300)):  # fmt: skip
        file = tmp_path / "data" / path
        images = file.parent / "images" if "Pretrain" in path else file.parent
        images.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(images / "a.jpg")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
        file.write_text(json.dumps([{"image": "a.jpg", "conversations": turns}] * count))
    return tmp_path


def test_there_are_six() -> None:
    assert len(SETTINGS) == 6


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting(name: str, data: Path) -> None:
    """What the dry run says of it on one of eight ranks, and the layer that PRe is at."""
    encoder, llm, tower_trains = re.fullmatch(r"(\w+?)-(.+)-(frozen|trained)", name).groups()  # type: ignore[union-attr]
    (vision, seen), (text, written, layer) = TOWERS[encoder], DECODERS[llm]
    config = load_config(CONFIGS / f"{name}.yaml", ["--trainer.use_cpu", "true"])
    folder = data / config.model
    LlavaConfig(vision_config=vision, text_config=text).save_pretrained(folder)
    lines = describe_run(config).splitlines()
    projector = (vision.hidden_size + text.hidden_size + 2) * text.hidden_size
    assert lines[0] == (
        f"model: {config.model}: {seen + projector + written:,} parameters "
        f"(tower {seen:,}, projector {projector:,}, llm {written:,})"
    )
    assert [line.split(": ", 2)[2] for line in lines[1:3]] == [
        "1,000 samples, 1,000 images, 0 samples of text alone",
        "300 samples, 300 images, 0 samples of text alone",
    ]
    trained = written + projector + (seen if tower_trains == "trained" else 0)
    parts = "tower, projector, llm" if tower_trains == "trained" else "projector, llm"
    assert lines[3:] == [
        f"stage align: 32 steps of 32 samples, {projector:,} parameters (projector), learning rate "
        "0.001, no PRe",
        f"stage tune: 19 steps of 16 samples, {trained:,} parameters ({parts}), learning rate "
        f"2e-05, PRe {{'weight': 0.5, 'layers': {layer}}}",
    ]
    pre = apply_pre(model_on_meta(folder), **(config.pre or {}))
    assert list(pre.heads) == [layer] and 2 * layer == text.num_hidden_layers
    assert pre.heads[layer].weights[0].shape == (text.hidden_size, text.hidden_size)


def test_the_twins_differ_in_one_thing() -> None:
    """Frozen and trained: the second stage's parts, and where it goes."""
    for name in SETTINGS:
        if not name.endswith("-frozen"):
            continue
        a = load_config(CONFIGS / f"{name}.yaml")
        b = load_config(CONFIGS / f"{name.removesuffix('frozen')}trained.yaml")
        assert a.model == b.model and a.data == b.data and a.trainer == b.trainer
        assert a.stages[0] == b.stages[0] and a.stages[1].trainer == b.stages[1].trainer
        assert set(b.stages[1].trainable) - set(a.stages[1].trainable) == {"tower"}
