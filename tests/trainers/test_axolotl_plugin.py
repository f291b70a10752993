# SPDX-License-Identifier: Apache-2.0
"""axolotl's plugin on a stand-in of what it imports; with the real one: tests/packages."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from prereg_kernels import find_pre
from prereg_kernels.trainers import PReTrainerMixin
from tests.integrations.test_peft import with_lora
from tests.tiny import tiny_llava

MODULE = "prereg_kernels.trainers.axolotl"


class AxolotlTrainer(Trainer):
    """A stand-in."""


class OtherTrainer(Trainer):
    """Of another plugin, or of the user's."""


class BasePlugin:
    """A stand-in, with what axolotl calls and PRePlugin leaves as it is."""

    def get_trainer_cls(self, cfg: Any) -> Any:
        return None


class Config(dict[str, Any]):
    """As axolotl's: what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __missing__(self, name: str) -> None:
        return None


def arguments_in(folder: Path) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none")


@pytest.fixture
def plugins() -> dict[str, Any]:
    """axolotl's plugins, by name."""
    return {}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, plugins: dict[str, Any]) -> Any:
    manager = SimpleNamespace(get_instance=lambda: SimpleNamespace(plugins=plugins))
    contents = {
        "axolotl": {},
        "axolotl.core": {},
        "axolotl.core.trainers": {},
        "axolotl.core.trainers.base": {"AxolotlTrainer": AxolotlTrainer},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin, "PluginManager": manager},
        "axolotl.utils": {},
        "axolotl.utils.import_helper": {
            "get_cls_from_module_str": lambda name: {"mine.OtherTrainer": OtherTrainer}[name]
        },
    }
    for name, members in contents.items():
        made = ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def test_settings_are_checked_by_its_model(module: Any) -> None:
    assert module.PRePlugin().get_input_args() == f"{MODULE}.PReArgs"
    assert module.PReArgs().model_dump() == {"pre": {}}
    assert module.PReArgs(pre=None).pre == {}
    written = {"weight": 0.3, "head_learning_rate": "1e-3", "layers": [1, 2]}
    assert module.PReArgs(pre=written).model_dump(exclude_none=True) == {
        "pre": {"weight": 0.3, "head_learning_rate": 0.001, "layers": [1, 2]}
    }
    for wrong, message in (
        ({"wieght": 1}, r"pre\.wieght: not a setting of PRe"),
        ({"weight": -1}, r"pre\.weight: expected a non-negative finite number"),
        (0.5, r"pre: expected settings such as"),
    ):
        with pytest.raises(ValidationError, match=message):
            module.PReArgs(pre=wrong)


def test_the_trainer_is_axolotls_with_pre(module: Any, plugins: dict[str, Any]) -> None:
    plugin = plugins["pre"] = module.PRePlugin()
    taken = plugin.get_trainer_cls(Config(pre={"weight": 0.3}))
    assert issubclass(taken, AxolotlTrainer) and issubclass(taken, PReTrainerMixin)
    assert taken.pre_settings == {"weight": 0.3}
    taken = plugin.get_trainer_cls(Config(trainer_cls="mine.OtherTrainer"))
    assert issubclass(taken, OtherTrainer) and taken.pre_settings == {}
    plugins["other"] = SimpleNamespace(get_trainer_cls=lambda cfg: OtherTrainer)
    assert issubclass(plugin.get_trainer_cls(Config()), OtherTrainer)


@pytest.mark.parametrize("name", ("rl", "reward_model", "process_reward_model"))
def test_training_on_text_alone_is_an_error(module: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected none with PRePlugin"):
        module.PRePlugin().get_trainer_cls(Config({name: "dpo"}))


def test_a_plugin_before_it_is_an_error(module: Any, tmp_path: Path) -> None:
    plugin, config = module.PRePlugin(), Config(plugins=["other.Plugin", "pre.PRePlugin"])
    model = tiny_llava()
    with pytest.raises(ValueError, match=r"other\.Plugin, pre\.PRePlugin, of which axolotl takes"):
        plugin.post_trainer_create(config, OtherTrainer(model, arguments_in(tmp_path)))
    made = plugin.get_trainer_cls(config)(model, arguments_in(tmp_path))
    plugin.post_trainer_create(config, made)


@pytest.mark.parametrize(
    "others, is_written",
    [
        ({"adapter": "lora", "local_rank": 0}, True),
        ({"adapter": "lora", "local_rank": 1}, False),
        ({"local_rank": 0}, False),  # the model's own `save_pretrained` has done so
        ({"adapter": "lora", "local_rank": 0, "fsdp_config": {"fsdp_version": 2}}, False),
        ({"adapter": "lora", "local_rank": 0, "deepspeed": "zero2.json"}, True),
        ({"adapter": "lora", "local_rank": 0, "deepspeed": "zero3.json"}, False),
    ],
)
def test_heads_beside_the_last_adapter(
    module: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    others: dict[str, Any],
    is_written: bool,
) -> None:
    is_zero3 = others.get("deepspeed") == "zero3.json"
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: is_zero3)
    plugin, model = module.PRePlugin(), with_lora(tiny_llava())
    config = Config(output_dir=str(tmp_path / "out"), pre={}, **others)
    plugin.get_trainer_cls(config)(model, arguments_in(tmp_path))
    plugin.post_train(config, model)
    path = tmp_path / "out" / "pre" / "pre_heads.safetensors"
    assert path.exists() == is_written
    if is_written:
        heads = find_pre(model).heads[2].state_dict()
        assert {n: x.tolist() for n, x in load_file(path).items()} == {
            f"2.{n}": x.tolist() for n, x in heads.items()
        }
