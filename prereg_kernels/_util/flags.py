# SPDX-License-Identifier: Apache-2.0
"""Flags of settings, as a command line has them."""

from __future__ import annotations

from collections.abc import Sequence

_TRAINS_OWN = ("--out", "--fresh", "--dry-run", "--help")
"""What is no setting of `prereg train`."""
_RECIPES = (".yaml", ".yml")
"""How no value of a setting ends: behind a flag that is none, it is the recipe."""


def is_value(argument: str) -> bool:
    """Whether it may be the value of the flag before it: no flag, as behind an empty variable.

    A value that begins like a flag stands behind a `=`.
    """
    return not argument.startswith("--") and argument != "-h"


def settings_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`prereg train`'s own arguments, flags of settings with their values), in whatever order.

    argparse would take the value of a setting for the recipe, where that comes behind it.
    """
    own, settings = list[str](), list[str]()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        is_setting = argument.startswith("--") and argument.partition("=")[0] not in _TRAINS_OWN
        (settings if is_setting else own).append(argument)
        has_value = bool(rest) and is_value(rest[0]) and not rest[0].endswith(_RECIPES)
        if is_setting and "=" not in argument and has_value:
            settings.append(rest.pop(0))
        elif argument == "--out" and rest:
            own.append(rest.pop(0))
    return own, settings
