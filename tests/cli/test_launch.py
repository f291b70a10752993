# SPDX-License-Identifier: Apache-2.0
"""`prereg llamafactory` and `prereg swift-plugin`, without those; with them: tests/packages."""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer

from prereg_kernels._util.settings_file import take_flags
from prereg_kernels._util.supported import absent
from prereg_kernels.cli import launch, main
from prereg_kernels.cli.launch import SWIFT_PLUGIN
from prereg_kernels.trainers import PReTrainerMixin, swift


def test_flags_of_pre() -> None:
    own = ["--stage", "sft", "--pre.weight", "0.3", "--pretrain", "x", "--pre.layers=[1, 2]"]
    others, settings = take_flags(own, "pre.")
    assert others == ["--stage", "sft", "--pretrain", "x"]
    assert settings == {"weight": 0.3, "layers": [1, 2]}
    with pytest.raises(ValueError, match=r"--pre\.weight: expected a value after it"):
        take_flags(["--pre.weight"], "pre.")


def test_a_trainer_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prereg", "llamafactory", "train", "x.yaml", "--help"])
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "llamafactory has to be in the environment" in printed


def test_a_trainer_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says nothing of what a torchvision of another torch has raised."""

    def broken(name: str) -> None:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    monkeypatch.setattr(launch, "import_module", broken)
    with pytest.raises(ValueError, match=r"'PreTrainedModel': operator torchvision::nms .*; llama"):
        launch.prepare("llamafactory", [])
    with pytest.raises(ModuleNotFoundError) as plain:
        import_module("a_module_that_nobody_has")
    assert absent(plain.value) == "No module named 'a_module_that_nobody_has'"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """ms-swift's mapping of tasks to trainers, after the plugin has run."""
    made_up, own = ModuleType("swift.trainers"), ModuleType("made_up")
    tasks = {"causal_lm": "made_up.OwnTrainer", "kto": "made_up.OwnTrainer"}
    made_up.TrainerFactory = SimpleNamespace(TRAINER_MAPPING=tasks)  # type: ignore[attr-defined]
    own.OwnTrainer = type("OwnTrainer", (Trainer,), {})  # type: ignore[attr-defined]
    for name, module in {"swift.trainers": made_up, "made_up": own}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(swift, "_originals", {})
    monkeypatch.setattr(swift, "_settings", {})
    runpy.run_path(str(SWIFT_PLUGIN))
    return tasks


def look_up(name: str) -> type:
    """As ms-swift does."""
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules[module], attribute)


def test_the_plugin(tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(tasks)
    swift.register(weight=0.1, layers=2)
    assert tasks == before, "twice is once"
    # As ms-swift writes what `model_kwargs` has to the environment
    monkeypatch.setenv("PRE", str({"weight": 0.3, "value_in_eval": True}))
    trainer: type[Any] = look_up(tasks["causal_lm"])
    assert issubclass(trainer, PReTrainerMixin) and trainer.__name__ == "PReOwnTrainer"
    assert trainer.pre_settings == {"weight": 0.3, "layers": 2, "value_in_eval": True}


def test_what_the_plugin_refuses(tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one of causal_lm, dpo with PRe, got kto"):
        look_up(tasks["kto"])
    monkeypatch.setenv("PRE", "{wieght: 1}")
    with pytest.raises(ValueError, match=r"PRE\.wieght: not a setting of PRe"):
        look_up(tasks["causal_lm"])
    monkeypatch.setitem(sys.modules, "swift.megatron", ModuleType("swift.megatron"))
    with pytest.raises(ValueError, match="expected the command swift with PRe"):
        runpy.run_path(str(SWIFT_PLUGIN))


def test_the_plugin_is_alone_in_its_folder() -> None:
    """ms-swift puts that first on sys.path."""
    names = {path.name for path in SWIFT_PLUGIN.parent.glob("*.py")}
    assert names == {"__init__.py", "pre_plugin.py"}
