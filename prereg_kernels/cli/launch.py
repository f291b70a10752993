"""The command of somebody's trainer, run with PRe in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

COMMANDS = {
    "llamafactory": ("prereg_kernels.cli.llamafactory", "llamafactory-cli, which trains with PRe"),
    "trl": ("prereg_kernels.cli.trl", "TRL's command, which trains with PRe"),
}
"""Of each: a module with `prepare(arguments)`, and what `prereg --help` says."""

SWIFT_PLUGIN = Path(__file__).parents[1] / "trainers" / "swift" / "pre_plugin.py"


def prepare(name: str, arguments: Sequence[str]) -> Callable[[], None]:
    """What runs a trainer's command with these arguments.

    Raises:
        ValueError: it is not installed, or what is asked for goes without PRe.
    """
    try:
        command = import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; {name} has to be in the environment that PRe is in") from None
    start: Callable[[], None] = command.prepare(arguments)
    return start


def take_flags(arguments: Sequence[str], name: str = "pre") -> tuple[list[str], dict[str, Any]]:
    """(the other arguments, {setting: value}): --pre.weight 0.3, or with a = between.

    Raises:
        ValueError: a flag without a value.
    """
    import yaml

    others: list[str] = []
    settings: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if not flag.startswith(f"--{name}."):
            others.append(argument)
            continue
        text = value if equals else next(rest, None)
        if text is None:
            raise ValueError(f"{flag}: expected a value, got none")
        settings[flag.removeprefix(f"--{name}.")] = yaml.safe_load(text)
    return others, settings
