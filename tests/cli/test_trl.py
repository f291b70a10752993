# SPDX-License-Identifier: Apache-2.0
"""`prereg trl` on a stand-in of TRL; with the real one: tests/packages."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import Trainer

from prereg_kernels.cli.launch import RANK
from prereg_kernels.trainers import PReTrainerMixin

MODULE = "prereg_kernels.cli.trl"
CLASSES = "prereg_kernels.trainers.trl"


class SFTTrainer(Trainer):
    """A stand-in."""


class DPOTrainer(Trainer):
    """A stand-in."""


class TrlParser:
    """A stand-in: of a file's settings it knows one."""

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        return [f"--{name}={x}" for name, x in config.items() if name != "learning_rate"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """TRL's modules, by name, and those of ours that import them anew."""
    trl = ModuleType("trl")
    trl.__dict__.update(SFTTrainer=SFTTrainer, DPOTrainer=DPOTrainer)
    modules = {"trl": trl}
    for name in ("cli", "cli.main", "cli.accelerate_launcher", "scripts", "scripts.utils"):
        modules[f"trl.{name}"] = ModuleType(f"trl.{name}")
    launcher = modules["trl.cli.accelerate_launcher"]
    modules["trl.cli"].__dict__["accelerate_launcher"] = launcher
    parser = type("TrlParser", (TrlParser,), {})  # which is changed
    modules["trl.scripts.utils"].__dict__["TrlParser"] = parser
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def main(arguments: list[str]) -> None:
        """As TRL's: reads its file, and starts the command's script with the flags."""
        name, flag, path, *flags = arguments
        assert flag == "--config"
        config = yaml.safe_load(Path(path).read_text())
        unknown = parser().set_defaults_with_config(**config)
        launcher.__dict__["launch_training_script"](
            script_name=f"{name}.py",
            launch_args=unknown,
            training_script_args=["--config", path, *flags],
        )

    modules["trl.cli.main"].__dict__["main"] = main
    for name in (MODULE, CLASSES):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(importlib.import_module(name.rpartition(".")[0]), "trl", None, False)
    yield modules
    for name in (MODULE, CLASSES):
        sys.modules.pop(name, None)


@pytest.fixture
def command(fake: dict[str, ModuleType]) -> Any:
    return importlib.import_module(MODULE)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    return lambda **settings: Path("x.yaml").write_text(yaml.safe_dump(settings)) and None


def test_accelerate_starts_ranks(
    command: Any, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the flags of PRe again; what is under `pre:` does not reach accelerate."""
    started: list[Any] = []
    monkeypatch.setattr(command, "launch_command", started.append)
    write(pre={"weight": 0.1}, learning_rate=1e-3, num_processes=2)
    flags = ["--pre.layers", "[1, 2]", "--pre.head_dtype=float32"]
    command.prepare(["sft", "--config", "x.yaml", *flags, "--max_steps", "4"])()
    (one,) = started
    assert not one.module and one.training_script == str(RANK) and one.num_processes == 2
    assert one.training_script_args == [
        "trl", "sft", "--config", "x.yaml", "--max_steps", "4", "--pre.layers=[1, 2]",
        '--pre.head_dtype="float32"',
    ]  # fmt: skip


def test_a_rank_runs_the_script_with_pre(
    command: Any,
    fake: dict[str, ModuleType],
    write: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def run_module(name: str, run_name: str) -> None:
        trainer = fake["trl"].__dict__["SFTTrainer"]
        seen.update(name=name, run_name=run_name, trainer=trainer, arguments=sys.argv[1:])

    monkeypatch.setattr(command.runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["before"])
    write(pre={"weight": 0.1, "head_learning_rate": "1e-2"})
    command.run(["sft", "--config", "x.yaml", "--max_steps", "4", "--pre.weight=0.3"])
    assert (seen["name"], seen["run_name"]) == ("trl.scripts.sft", "__main__")
    assert seen["arguments"] == ["--config", "x.yaml", "--max_steps", "4"]
    trainer = seen["trainer"]
    assert issubclass(trainer, SFTTrainer) and issubclass(trainer, PReTrainerMixin)
    assert trainer.pre_settings == {"weight": 0.3, "head_learning_rate": 0.01}
    assert fake["trl"].__dict__["DPOTrainer"] is DPOTrainer


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sft", "--config", "x.yaml"], r"pre\.wieght: not a setting of PRe"),
        (["sft", "--config", "none.yaml"], r"--config: .*none\.yaml"),
        (["sft", "--pre.weight", "-1"], r"pre\.weight: expected a non-negative finite number"),
        (["kto", "--config", "x.yaml"], "expected one of sft, dpo, grpo with PRe, got 'kto'"),
    ],
)
def test_errors(
    command: Any, write: Callable[..., None], arguments: list[str], message: str
) -> None:
    write(pre={"wieght": 1})
    with pytest.raises(ValueError, match=message):
        command.prepare(arguments)


@pytest.mark.parametrize("arguments", (["env"], ["--help"], []))
def test_what_trains_nothing_is_trls_own(
    command: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "main", seen.append)
    command.prepare(arguments)()
    assert seen == [arguments]


def test_ready_made_classes(fake: dict[str, ModuleType]) -> None:
    classes = importlib.import_module(CLASSES)
    made = classes.PReSFTTrainer
    assert issubclass(made, SFTTrainer) and issubclass(made, PReTrainerMixin)
    assert made is classes.PReSFTTrainer and made.pre_settings == {}
    assert (made.__module__, made.__qualname__) == (CLASSES, "PReSFTTrainer")  # for pickle
    assert issubclass(classes.PReDPOTrainer, DPOTrainer)
    with pytest.raises(AttributeError, match="PReKTOTrainer"):
        _ = classes.PReKTOTrainer
