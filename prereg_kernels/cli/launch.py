# SPDX-License-Identifier: Apache-2.0
"""The command of somebody's trainer, run with PRe in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from prereg_kernels._util.supported import absent

COMMANDS = {
    "llamafactory": ("prereg_kernels.cli.llamafactory", "llamafactory-cli, which trains with PRe"),
    "trl": ("prereg_kernels.cli.trl", "TRL's command, which trains with PRe"),
}
"""Of each: a module with `prepare(arguments)` and `run(arguments)`, a rank's part of it; and what
`prereg --help` says."""

RANK = Path(__file__).with_name("rank.py")
"""What a launcher starts as a rank: with a command's name, then its arguments."""

SWIFT_PLUGIN = Path(__file__).parents[1] / "trainers" / "swift" / "pre_plugin.py"


def prepare(name: str, arguments: Sequence[str]) -> Callable[[], None]:
    """What runs a trainer's command with these arguments.

    Raises:
        ValueError: it is not installed, or what is asked for goes without PRe.
    """
    try:
        command = import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        hint = f"{name} has to be in the environment that PRe is in"
        raise ValueError(f"{absent(error)}; {hint}, beside packages that fit it") from None
    start: Callable[[], None] = command.prepare(arguments)
    return start


def run_rank(name: str, *arguments: str) -> None:
    """A rank's part of a trainer's command."""
    import_module(COMMANDS[name][0]).run(arguments)
