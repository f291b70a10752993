# SPDX-License-Identifier: Apache-2.0
"""Each private name of transformers that we use is there, and does what we use it for."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from prereg_kernels._util import private
from tests.releases import HERE


def tiny(**settings: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings))


def test_ignored_on_save(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny()
    model.add_module("extra", nn.Linear(2, 2))
    setattr(model, private.IGNORED_ON_SAVE, {"extra.weight"})
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "extra.weight" not in names and "extra.bias" in names


def test_unsplit_modules() -> None:
    from accelerate import FullyShardedDataParallelPlugin

    model = tiny()
    assert list(getattr(model, private.UNSPLIT_MODULES)) == ["LlamaDecoderLayer"]
    model.add_module("extra", nn.Bilinear(2, 2, 2))
    setattr(model, private.UNSPLIT_MODULES, ["Bilinear"])
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, auto_wrap_policy="transformer_based_wrap"
    )
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {nn.Bilinear}


def test_gpus(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=3, use_cpu=True)
    for count, rows in ((1, 3), (2, 6)):
        setattr(arguments, private.GPUS, count)
        assert (arguments.n_gpu, arguments.train_batch_size) == (count, rows)


def test_saved_files(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"x": [1, 2]}).save_to_disk(str(tmp_path))
    named = json.loads((tmp_path / "state.json").read_text())[private.SAVED_FILES]
    assert [each["filename"] for each in named] == [x.name for x in tmp_path.glob("*.arrow")]


def test_name_or_path(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    settings = LlamaForCausalLM.from_pretrained(tmp_path).config.to_dict()
    assert settings[private.NAME_OR_PATH] == str(tmp_path)


def test_attention() -> None:
    config = tiny(attn_implementation="eager").config
    assert getattr(config, private.ATTENTION) == "eager"
    setattr(config, private.ATTENTION, "sdpa")
    model = LlamaForCausalLM(config)
    assert getattr(model.config, private.ATTENTION) == "sdpa"
    assert getattr(model.model.layers[0].self_attn.config, private.ATTENTION) == "sdpa"


@pytest.mark.parametrize("key", private.IMPLEMENTATIONS[:: 2 if HERE >= (5, 0) else 4])
def test_keys_that_name_code(key: str) -> None:
    """A file that has such a key decides what the config says, and where it keeps that."""
    config = LlamaConfig.from_dict({"model_type": "llama", key: "eager"})
    assert getattr(config, key) == vars(config)[f"{key}_internal"] == "eager"
    assert f"{key}_internal" in private.IMPLEMENTATIONS


class Recorder(Trainer):
    """Notes which of Trainer's private methods ran, in order."""

    calls: list[str]


def _record(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(name)
        if name == "_push_from_checkpoint":  # it goes to the hub
            return None
        return getattr(super(Recorder, self), name)(*args, **kwargs)

    return method


for _name in private.TRAINER_METHODS | private.RECIPE_METHODS:
    setattr(Recorder, _name, _record(_name))


def recorder(out: Path) -> Recorder:
    torch.manual_seed(0)
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(2)]
    settings = {"max_steps": 1, "save_steps": 1, "eval_steps": 1, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(
        str(out), eval_strategy="steps", load_best_model_at_end=True, disable_tqdm=True, **settings
    )
    made = Recorder(tiny(), arguments, train_dataset=rows, eval_dataset=rows)
    made.calls = []
    made.args.push_to_hub = True  # after it was made, so that it has not asked the hub
    return made


def test_what_trainer_calls(tmp_path: Path) -> None:
    first = recorder(tmp_path)
    first.train()
    assert [name for name in first.calls if name in private.TRAINER_METHODS] == [
        "_save",
        "_push_from_checkpoint",
        "_load_best_model",
        "_issue_warnings_after_load",
    ]
    best = first.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-1")
    again = recorder(tmp_path)
    again.train(resume_from_checkpoint=best)
    assert [name for name in again.calls if name in private.TRAINER_METHODS][:2] == [
        "_load_from_checkpoint",
        "_issue_warnings_after_load",
    ]
    # `prereg train` asks for a newer release than the trainers do
    recipe = (
        private.RECIPE_METHODS if HERE >= (5, 6) else private.RECIPE_METHODS - {"_get_grad_norm"}
    )
    assert {*first.calls, *again.calls} == private.TRAINER_METHODS | recipe


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("_issue_warnings_after_load", ["self", "load_result"]),
    ],
)
def test_what_trainers_methods_take(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters


def test_warnings_after_load_say_what_is_missing(caplog: Any, tmp_path: Path) -> None:
    """Names of `IGNORED_ON_SAVE` alone are missing without a word; others are named."""
    trainer = recorder(tmp_path)
    model = trainer.model
    result = model.load_state_dict({}, strict=False)
    said: list[str] = []
    import transformers.trainer as module

    class Log:
        def warning(self, message: str, *args: Any) -> None:
            said.append(message)

    before, module.logger = module.logger, Log()  # type: ignore[assignment]
    try:
        trainer._issue_warnings_after_load(result)
        assert len(said) == 1 and "model.norm.weight" in said[0]
        setattr(model, private.IGNORED_ON_SAVE, set(result.missing_keys))
        trainer._issue_warnings_after_load(result)
    finally:
        module.logger = before
    assert len(said) == 1
