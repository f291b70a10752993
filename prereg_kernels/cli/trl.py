# SPDX-License-Identifier: Apache-2.0
"""`prereg trl sft --config x.yaml`: TRL's command, with PRe in the trainer that its script makes.

TRL (1.16) has no plugins. PRe's settings are under `pre:` in its YAML file, or --pre.weight 0.3
on the command line; its own parser does not get to see them. TRL starts its scripts by accelerate;
the same is done here with `rank.py`, which each rank runs.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import trl
from accelerate.commands.launch import launch_command, launch_command_parser
from trl.cli import accelerate_launcher
from trl.cli.main import main
from trl.scripts.utils import TrlParser

from prereg_kernels._util.settings_file import read_yaml, take_flags
from prereg_kernels.cli.launch import RANK
from prereg_kernels.trainers.attaching import with_pre
from prereg_kernels.trainers.attachment import AttachSettings, read_settings

TRAINERS = {"sft": "SFTTrainer", "dpo": "DPOTrainer", "grpo": "GRPOTrainer"}
"""What the scripts take from TRL."""
OTHERS = ("env", "vllm-serve")
"""Commands that train nothing."""


def prepare(arguments: Sequence[str]) -> Callable[[], Any]:
    """What runs TRL's command: a script of TRAINERS with PRe, or one of OTHERS as it is there.

    Raises:
        ValueError: a setting, or another command.
    """
    command = arguments[0] if arguments else "--help"
    if command in TRAINERS:
        own, flags = take_flags(arguments, "pre.")
        _read(arguments)  # so that what is wrong is said once, before there are ranks
        arguments = own
        TrlParser.set_defaults_with_config = _without_pre(TrlParser.set_defaults_with_config)
        accelerate_launcher.launch_training_script = _launcher(flags)
    elif command not in OTHERS and not command.startswith("-"):
        raise ValueError(f"trl: expected one of {', '.join(TRAINERS)} with PRe, got {command!r}")
    return lambda: main(list(arguments))


def run(arguments: Sequence[str]) -> None:
    """What a rank runs: TRL's script of this name, with these arguments."""
    name, *rest = arguments
    settings = _read(rest)
    setattr(trl, TRAINERS[name], with_pre(getattr(trl, TRAINERS[name]), **settings))
    own, _ = take_flags(rest, "pre.")
    sys.argv = [f"trl {name}", *own]
    runpy.run_module(f"trl.scripts.{name}", run_name="__main__")


def _read(arguments: Sequence[str]) -> AttachSettings:
    """PRe's settings, from the file and from the flags, which win.

    Raises:
        ValueError: one of them is unknown or wrong.
    """
    own, flags = take_flags(arguments, "pre.")
    written: Any = None
    if "--config" in own[:-1]:  # the one form that TRL takes
        try:
            read = read_yaml(own[own.index("--config") + 1])
        except (OSError, ValueError) as error:
            raise ValueError(f"--config: {error}") from None
        written = read.get("pre") if isinstance(read, dict) else None
    settings = read_settings(written)
    return read_settings({**settings, **flags}) if flags else settings


def _without_pre(set_defaults: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """TRL's reading of its file; what it does not know there would go to accelerate."""

    def set_defaults_with_config(self: Any, pre: Any = None, **config: Any) -> list[str]:
        return set_defaults(self, **config)

    return set_defaults_with_config


def _launcher(flags: dict[str, Any]) -> Callable[..., None]:
    """In place of TRL's, which would start the script itself."""
    again = [f"--pre.{name}={_text(value)}" for name, value in flags.items()]

    def launch(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
        name = script_name.removesuffix(".py")
        program = [str(RANK), "trl", name, *training_script_args, *again]
        launch_command(launch_command_parser().parse_args([*launch_args, *program]))

    return launch


def _text(value: Any) -> str:
    """What `take_flags` reads as this value."""
    import json

    return json.dumps(value)
