# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run as a flag: tyro makes them of the dataclasses that a YAML file fills."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")

_FIELD = re.compile(r"(?P<part>\S+): (?P<field>[\w.]+): (?P<rest>expected .*)")


def override(settings: T, flags: Sequence[str]) -> T:
    """The settings, with those that flags name: `--run.pre.weight 0.5`, `--run.stages.1.steps 9`.

    Raises:
        ValueError: an unknown flag, a wrong type, a value out of range: one line that names it.
    """
    if not flags:
        return settings
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return _parse(settings, flags, "prereg", add_help=False)
    except SystemExit:
        raise ValueError(_message(printed.getvalue(), type(settings).__name__)) from None


def show(settings: object, command: str) -> None:
    """Print every flag of a command, with what it means and its value in these settings."""
    with contextlib.suppress(SystemExit):
        _parse(settings, ["--help"], f"prereg {command}", add_help=True)


def _parse(settings: T, flags: Sequence[str], command: str, add_help: bool) -> T:
    parsed: T = tyro.cli(
        type(settings),
        default=settings,
        args=flags,
        prog=command,
        use_underscores=True,  # names as in YAML files
        add_help=add_help,
    )
    return parsed


def _message(printed: str, root: str) -> str:
    """The first paragraph in the frame that tyro draws, in this package's words."""
    lines: list[str] = []
    for line in printed.splitlines():
        text = line.strip(" │")
        if lines and text.startswith(("──", "╰")):
            break
        if not line.startswith("╭"):
            lines.append(text)
    error = " ".join(lines).removeprefix("Error parsing ").rstrip(".")
    field = _FIELD.fullmatch(error)
    if field is not None:  # what a dataclass says of one of its fields
        part = "" if field["part"] == root else f"{field['part']}."
        return f"--{part}{field['field']}: {field['rest']}"
    error = error.replace("Unrecognized options:", "unknown flags:")
    return f"{error}; --settings lists all flags"
