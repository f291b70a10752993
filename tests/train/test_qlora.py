# SPDX-License-Identifier: Apache-2.0
"""QLoRA: a run of the command, stopped and gone on with; its adapter is read as it was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftConfig as AdapterConfig
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, TrainerCallback

from prereg_kernels.train.models import load_whole, with_adapter
from tests.cli.run import Command
from tests.train.places import make_place, settings, timeless, write
from tests.train.test_run import Crash, heads, same, with_callback

LORA = {"r": 4, "lora_alpha": 8}
SCALE = LORA["lora_alpha"] / LORA["r"]
PROJECTOR = "model.multi_modal_projector."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def recipe(place: Path, out: Path) -> str:
    """The path of the settings' file."""
    values = settings(
        place, out, lora=LORA, quantization={"load_in_4bit": True}, stages__0__max_steps=1,
        stages__1__max_steps=5, trainer__learning_rate=0.02,
    )  # fmt: skip
    return str(write(out.parent / f"{out.name}.yaml", values))


class Look(TrainerCallback):
    """The classes of the modules that a step is taken with."""

    def __init__(self) -> None:
        self.kinds: dict[str, type] = {}

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.kinds = {name: type(module) for name, module in model.named_modules()}


def test_a_run_of_the_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prereg_here: Command
) -> None:
    look = Look()
    with monkeypatch.context() as patch:
        with_callback(patch, look)
        done = prereg_here("train", recipe(place, tmp_path / "whole"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    small = {name for name, kind in look.kinds.items() if kind is Linear4bit}
    assert len(small) == 4 * 7 and all(".language_model.layers." in name for name in small)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        with_callback(patch, Crash(3))
        done = prereg_here("train", recipe(place, out), cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert [x.name for x in (out / "stages/tune").glob("checkpoint-*")] == ["checkpoint-2"]
    done = prereg_here("train", recipe(place, out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(adapter(out), adapter(tmp_path / "whole"))
    assert same(heads(out), heads(tmp_path / "whole"))
    assert timeless(out, "tune") == timeless(tmp_path / "whole", "tune")

    by_hand = merged_by_hand(out)
    base = AutoModelForImageTextToText.from_pretrained(out / "stages/align/model")
    model = PeftModel.from_pretrained(base, str(out)).merge_and_unload()
    plain = model.state_dict()
    assert plain.keys() == by_hand.keys()
    for name, x in by_hand.items():
        torch.testing.assert_close(plain[name], x, rtol=0, atol=1e-6, msg=name)

    model.load_state_dict(by_hand)
    model.save_pretrained(tmp_path / "plain")
    base_of = tmp_path / "base"
    for folder in (tmp_path / "plain", base_of):
        folder.mkdir(exist_ok=True)
        for path in (out / "stages/align/model").iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())
    data = ("--data", str(place / "data.json"), "--images", str(place / "images"))
    for model_of in (out, tmp_path / "plain", base_of):
        done = prereg_here("evaluate", str(model_of), *data, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert answers(out) == answers(tmp_path / "plain") != answers(base_of)


def test_the_base_is_found_from_elsewhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the recipe names folders by relative paths."""
    monkeypatch.chdir(place)
    model = with_adapter(load_whole("model"), LORA, ["llm"])
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert AdapterConfig.from_pretrained("adapter").base_model_name_or_path == str(place / "model")
    plain = load_whole(place / "model").state_dict()
    assert all(x.equal(plain[name]) for name, x in load_whole("adapter").state_dict().items())


def adapter(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter_model.safetensors")


def merged_by_hand(out: Path) -> dict[str, Tensor]:
    """W + scale B A of each linear layer, and the projector as it was trained."""
    whole = dict(AutoModelForImageTextToText.from_pretrained(
        out / "stages/align/model"
    ).state_dict())  # fmt: skip
    parts = {name.removeprefix("base_model.model."): x for name, x in adapter(out).items()}
    trained = {name for name in parts if name.startswith(PROJECTOR)}
    assert trained == {name for name in whole if name.startswith(PROJECTOR)}
    assert all(not parts[name].equal(whole[name]) for name in trained)
    factors = set(layers(parts))
    assert len(factors) == 4 * 7 and {f"{name}.weight" for name in factors} <= whole.keys()
    for name in trained:
        whole[name] = parts[name]
    for name in factors:
        a, b = (parts[f"{name}.lora_{factor}.weight"] for factor in "AB")
        assert b.any()
        whole[f"{name}.weight"] = whole[f"{name}.weight"] + SCALE * (b @ a)
    return whole


def layers(parts: dict[str, Tensor]) -> Iterator[str]:
    for name in parts:
        if name.endswith(".lora_A.weight"):
            yield name.removesuffix(".lora_A.weight")


def answers(out: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    return [(line["where"], line["answer"]) for line in lines]


def test_the_llm_trains_in_the_last_stage_alone(
    place: Path, tmp_path: Path, prereg_here: Command
) -> None:
    """An adapter of quantized weights is not merged, so that no stage could begin with it."""
    path = recipe(place, tmp_path / "out")
    done = prereg_here("train", path, "--stages.0.trainable", "[llm]", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "stages: expected the LLM to train in the last stage alone" in done.stderr
