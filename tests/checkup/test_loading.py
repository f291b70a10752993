# SPDX-License-Identifier: Apache-2.0
"""Models that are spread over places, or rounded as they load, are measured like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from prereg_kernels.checkup.images.datasets import ImageFolder
from prereg_kernels.checkup.images.image_batches import ImageBatches
from prereg_kernels.checkup.loading import Loaded, load
from prereg_kernels.checkup.results import CheckupResults
from prereg_kernels.checkup.run import checkup
from tests.attach.families.models import make_model
from tests.checkup.pictures import save_folder, save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("placed")
    save_folder(place, 6)
    directory = save_model(place / "model")
    model: Any = make_model("qwen2_5_vl")
    config, sizes = model.config, {"hidden_size": 64, "intermediate_size": 64}
    # bitsandbytes takes such sizes on a CPU with AVX-512
    config.vision_config.update({**sizes, "out_hidden_size": 64})
    config.text_config.update({**sizes, "num_attention_heads": 4, "num_key_value_heads": 2})
    torch.manual_seed(0)
    type(model)(config).save_pretrained(directory)
    return place


def measured(loaded: Loaded, place: Path, out: str) -> CheckupResults:
    images = ImageFolder(place / "images", masks=place / "masks", masks_are="classes")
    return checkup(loaded.model, ImageBatches(loaded, images), place / out, splits=2)


def test_weights_on_a_disk_give_the_same_numbers(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate keeps such weights on the meta device, but for the time of a module's forward."""
    model: Any = load(place / "model").model
    # the logit lens reads this weight outside of its module's forward
    parts = {name: "cpu" for name, _ in model.model.named_children()}
    device_map = {f"model.{name}": where for name, where in parts.items()} | {"lm_head": "disk"}
    monkeypatch.chdir(place)  # where accelerate puts a folder
    loaded = load(place / "model", device_map=device_map)
    assert loaded.model.lm_head.weight.device.type == "meta"
    expected = measured(load(place / "model"), place, "plain")
    found = measured(loaded, place, "spread")
    assert found.curves == expected.curves
    assert found.lenses == expected.lenses


def test_four_bits_are_the_rounded_weights(place: Path) -> None:
    loaded = load(place / "model", bits=4)
    rounded = {
        name: module for name, module in loaded.model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }  # fmt: skip
    assert any("language_model.layers.1.mlp" in name for name in rounded)
    assert "4 bits" in " ".join(loaded.notes)
    plain = load(place / "model")
    with torch.no_grad():
        for name, module in rounded.items():
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.model.get_submodule(name).weight.copy_(weight)
    expected, found = measured(plain, place, "dequantised"), measured(loaded, place, "four")
    untouched = measured(load(place / "model"), place, "untouched")
    # bitsandbytes computes in bfloat16 on some CPUs, which is less than what rounding does
    curves = [
        np.array([x.value for x in results.curves["cosine to input"][1:]])
        for results in (found, expected, untouched)
    ]
    assert 5 * abs(curves[0] - curves[1]).max() < abs(curves[0] - curves[2]).max()


def test_eight_bits_load(place: Path) -> None:
    loaded = load(place / "model", bits=8)
    assert any(isinstance(module, bnb.nn.Linear8bitLt) for module in loaded.model.modules())
    assert isinstance(loaded.model.lm_head, nn.Linear)
    found, plain = measured(loaded, place, "eight"), measured(load(place / "model"), place, "plain")
    close = plain.curves["median norm"][1].value
    assert found.curves["median norm"][1].value == pytest.approx(close, rel=0.05)
    with pytest.raises(ValueError, match="bits: expected 4 or 8, got 3"):
        load(place / "model", bits=3)
