# SPDX-License-Identifier: Apache-2.0
"""The tower: a function of its settings, cached, and one that learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prereg_kernels._util import checked
from prereg_kernels.demo.data.packing import build_tokenizer
from prereg_kernels.demo.data.scenes import ATTRIBUTES, SceneConfig
from prereg_kernels.demo.model.llava import ModelConfig, attention_implementation, build_model
from prereg_kernels.demo.model.tower import train_tower, trained_tower
from prereg_kernels.demo.schedule import cosine_with_warmup
from tests.demo.tiny import MODEL, TOWER


def test_trained_once_and_equal_ever_after(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = trained_tower(
        MODEL, SceneConfig(), TOWER, tmp_path, on_step=lambda i, n: seen.append((i, n))
    )
    assert seen == [(1, 2), (2, 2)] and first.seconds > 0
    cached = trained_tower(MODEL, SceneConfig(), TOWER, tmp_path)
    again = train_tower(MODEL, SceneConfig(), TOWER)
    assert cached.seconds == 0.0 and cached.accuracy == first.accuracy
    for other in (cached.state, again.state):
        assert other.keys() == first.state.keys()
        assert all(torch.equal(value, other[name]) for name, value in first.state.items())
    trained_tower(MODEL, SceneConfig(), replace(TOWER, seed=1), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ("cut short", "a bit", "another tower", "no accuracy"))
def test_a_damaged_one_is_trained_again(tmp_path: Path, damage: str) -> None:
    first = trained_tower(MODEL, SceneConfig(), TOWER, tmp_path)
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut short":
        del content[-9:]
    elif damage == "a bit":
        content[-1] ^= 4
    elif damage == "another tower":
        state = {name: x[:1].clone() for name, x in first.state.items()}
        content = bytearray(checked.to_bytes(state, {"accuracy": first.accuracy}))
    else:
        content = bytearray(checked.to_bytes(first.state, {"accuracy": {"digit": 1.0}}))
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"tower-\w+\.safetensors is damaged: .*trained again"):
        again = trained_tower(MODEL, SceneConfig(), TOWER, tmp_path)
    assert all(torch.equal(x, again.state[name]) for name, x in first.state.items())
    assert trained_tower(MODEL, SceneConfig(), TOWER, tmp_path).accuracy == first.accuracy


def test_one_of_version_0_1_0_is_used(tmp_path: Path) -> None:
    """Its accuracy stood in a file beside it."""
    trained_tower(MODEL, SceneConfig(), TOWER, tmp_path)
    [path] = tmp_path.iterdir()
    state = {name: x + 1 for name, x in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    accuracy = dict.fromkeys(("digit", *ATTRIBUTES, "cell"), 0.25)
    path.with_suffix(".json").write_text(json.dumps({"accuracy": accuracy}))
    found = trained_tower(MODEL, SceneConfig(), TOWER, tmp_path)
    assert found.accuracy == accuracy and found.seconds == 0
    assert all(torch.equal(x, found.state[name]) for name, x in state.items())


def test_it_learns_to_see() -> None:
    """Polarity and cell are easy: a few seconds must take them far above chance."""
    model = replace(MODEL, width=64, tower_layers=2, tower_mlp=64)
    result = train_tower(model, SceneConfig(), replace(TOWER, steps=120, batch=16, warmup=10))
    assert result.accuracy["polarity"] > 0.85
    assert result.accuracy["cell"] > 0.9


def test_models_are_a_function_of_their_seed() -> None:
    tokenizer = build_tokenizer(SceneConfig())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (build_model(MODEL, SceneConfig(), tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.lm_head.weight for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    layer = a.model.language_model.layers[0].mlp.up_proj.weight
    assert abs(float(layer.detach().std()) - 0.1) < 0.01


@pytest.mark.parametrize(
    ("field", "value"), [("width", 100), ("decoder_layers", 0), ("initializer_range", 0.0)]
)
def test_bad_sizes_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        replace(ModelConfig(heads=8), **{field: value})


def test_attention_falls_back_to_sdpa() -> None:
    assert attention_implementation("cpu", precision="bf16", block_mask=False) == "sdpa"


def test_flash_attention_needs_package_gpu_and_a_plain_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for capability, expected in (((9, 0), "flash_attention_2"), ((7, 5), "sdpa")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, c=capability: c)
        assert attention_implementation("cuda", precision="bf16", block_mask=False) == expected
        assert attention_implementation("cuda", precision="bf16", block_mask=True) == "sdpa"
        assert attention_implementation("cuda", precision="fp32", block_mask=False) == "sdpa"


def test_schedule() -> None:
    factors = [cosine_with_warmup(step, 20, 5) for step in range(20)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.02
    assert cosine_with_warmup(0, 1, 0) == 1.0
