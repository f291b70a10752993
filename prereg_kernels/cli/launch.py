# SPDX-License-Identifier: Apache-2.0
"""The command of somebody's trainer, run with PRe in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

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
        raise ValueError(_absent(name, error)) from None
    start: Callable[[], None] = command.prepare(arguments)
    return start


def _absent(name: str, error: ModuleNotFoundError) -> str:
    """Why the trainer is not there: transformers hides what another package's import raised."""
    first: BaseException = error
    while (earlier := first.__cause__ or first.__context__) is not None:
        first = earlier
    if first is error:
        return f"{error}; {name} has to be in the environment that PRe is in"
    return f"{error}: {first}; {name} is there, or a package of its own, and cannot be imported"
