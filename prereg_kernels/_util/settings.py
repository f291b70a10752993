# SPDX-License-Identifier: Apache-2.0
"""What all settings have to be, whoever makes them: of their kind, finite, not beyond use."""

from __future__ import annotations

import dataclasses
import math
import numbers
import typing
from collections.abc import Mapping
from typing import Any

LARGEST, LARGEST_SEED = 2**31 - 1, 2**63 - 1


def require(name: str, holds: bool, expected: str, value: object) -> None:
    """Raise ValueError, naming the setting, unless the condition holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def require_count(name: str, value: int, most: int = 2**16) -> None:
    """As `require`, of things that are in memory together, such as the scenes of a batch."""
    require(name, value >= 1, "at least 1", value)
    require(name, value <= most, f"at most {most}", value)


def check_numbers(config: Any) -> None:
    """Raise ValueError, naming the field, unless each number of a dataclass is what its hint says.

    Integers are no larger than `LARGEST`, seeds than `LARGEST_SEED`; no bool is a number, and no
    number is a bool.
    """
    for name, kinds in _kinds(config).items():
        value = getattr(config, name)
        several = value.values() if isinstance(value, Mapping) else value
        for number in several if isinstance(value, (Mapping, tuple)) else (value,):
            if number is not None or type(None) not in kinds:
                _check(name, kinds, number)


def _check(name: str, kinds: frozenset[type], value: Any) -> None:
    is_bool = isinstance(value, bool)
    if bool in kinds:
        require(name, is_bool, "true or false", value)
    elif float in kinds:
        real = isinstance(value, numbers.Real) and not is_bool
        require(name, real and math.isfinite(value), "a finite number", value)
    elif int in kinds:
        most = LARGEST_SEED if name == "seed" else LARGEST
        whole = isinstance(value, numbers.Integral) and not is_bool
        require(name, whole and abs(value) <= most, f"an integer of at most {most}", value)


def _kinds(config: Any) -> dict[str, frozenset[type]]:
    """{field: the plain types in its hint}."""

    def leaves(hint: Any) -> set[type]:
        inside = typing.get_args(hint)
        return set().union(*map(leaves, inside)) if inside else {hint}

    hints = typing.get_type_hints(type(config))
    return {item.name: frozenset(leaves(hints[item.name])) for item in dataclasses.fields(config)}


def shown(value: object) -> str:
    """A value from a file, in a message: as Python writes it, cut to what a line can hold."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
