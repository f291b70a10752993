# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene. Every answer is one word, and the argument comes last.

A short template with its argument at the end, where the answer is read off, is learned several
times faster than one with the argument in the middle.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from prereg_kernels.demo.data.scenes import ATTRIBUTES, Scene, SceneConfig

DIGITS = tuple(str(digit) for digit in range(10))
YES, NO = "yes", "no"
COMMON_FAMILIES = ("count", "read", "presence", "comparison")
TRANSFER_FAMILIES = tuple(ATTRIBUTES)
BIASED_PRESENCE = "biased presence"
"""Presence, where most answers are yes."""
FAMILIES = (*COMMON_FAMILIES, *TRANSFER_FAMILIES, BIASED_PRESENCE)

_MOSTLY = 0.85

_NINE_CELLS = (
    "top-left", "top", "top-right",
    "left", "center", "right",
    "bottom-left", "bottom", "bottom-right",
)  # fmt: skip


class Question(NamedTuple):
    """One question: its family, the words of the prompt and the one-word answer."""

    family: str
    prompt: tuple[str, ...]
    answer: str


def cell_names(grid: int) -> tuple[str, ...]:
    """The words for the cells of a grid x grid scene, row-major."""
    if grid == 3:
        return _NINE_CELLS
    return tuple(f"r{row}c{column}" for row in range(grid) for column in range(grid))


def words(config: SceneConfig) -> tuple[str, ...]:
    """Every word that a question or an answer about such scenes can hold, once each."""
    fixed = ("how", "many", "digit", "at", "is", "there", "larger", YES, NO)
    values = tuple(value for names in ATTRIBUTES.values() for value in names)
    counts = tuple(str(count) for count in range(config.max_digits + 1))
    return tuple(
        dict.fromkeys(
            fixed + DIGITS + cell_names(config.grid) + TRANSFER_FAMILIES + values + counts
        )
    )


def description(scene: Scene, rng: random.Random, *, grid: int = 3) -> tuple[str, ...]:
    """A scene in words: for each digit, in an order drawn from `rng`, its cell, its class and its
    attributes ("top-left 3 dark upright striped thin"). It says more than the questions ask for, as
    an image does."""
    cells = cell_names(grid)
    told: list[str] = []
    for item in rng.sample(scene.objects, len(scene.objects)):
        told += (cells[item.cell], DIGITS[item.digit])
        told += (values[getattr(item, name)] for name, values in ATTRIBUTES.items())
    return tuple(told)


def _count(scene: Scene, cells: tuple[str, ...], rng: random.Random) -> Question:
    """ "how many 3": mostly of a class that is there, else "0" would be the best guess."""
    digits = [item.digit for item in scene.objects]
    asked = rng.choice(digits) if rng.random() < 0.8 else rng.randrange(10)
    return Question("count", ("how", "many", DIGITS[asked]), str(digits.count(asked)))


def _read(scene: Scene, cells: tuple[str, ...], rng: random.Random) -> Question:
    """ "digit at top-left": which digit is there (only cells that hold one are asked for)."""
    item = rng.choice(scene.objects)
    return Question("read", ("digit", "at", cells[item.cell]), DIGITS[item.digit])


def _presence(
    scene: Scene,
    cells: tuple[str, ...],
    rng: random.Random,
    family: str = "presence",
    yes: float = 0.5,
) -> Question:
    """ "is there 7": yes so often."""
    present = sorted({item.digit for item in scene.objects})
    absent = [digit for digit in range(10) if digit not in present]
    is_there = rng.random() < yes
    asked = rng.choice(present if is_there or not absent else absent)
    return Question(family, ("is", "there", DIGITS[asked]), YES if asked in present else NO)


def _comparison(scene: Scene, cells: tuple[str, ...], rng: random.Random) -> Question:
    """ "larger top left": is the digit at top larger than the digit at left."""
    first, second = rng.choice(scene.objects), rng.choice(scene.objects)
    for _ in range(4):  # equal digits are a "no"; a few tries keep yes and no near balance
        if first.digit != second.digit:
            break
        first, second = rng.choice(scene.objects), rng.choice(scene.objects)
    answer = YES if first.digit > second.digit else NO
    return Question("comparison", ("larger", cells[first.cell], cells[second.cell]), answer)


def _attribute(name: str) -> Callable[[Scene, tuple[str, ...], random.Random], Question]:
    """ "tilt at top-left": the attribute `name` of the digit there."""

    def ask(scene: Scene, cells: tuple[str, ...], rng: random.Random) -> Question:
        item = rng.choice(scene.objects)
        return Question(name, (name, "at", cells[item.cell]), ATTRIBUTES[name][getattr(item, name)])

    return ask


_ASK: dict[str, Callable[[Scene, tuple[str, ...], random.Random], Question]] = {
    "count": _count,
    "read": _read,
    "presence": _presence,
    "comparison": _comparison,
    BIASED_PRESENCE: partial(_presence, family=BIASED_PRESENCE, yes=_MOSTLY),
    **{name: _attribute(name) for name in ATTRIBUTES},
}


def check_families(families: Mapping[str, float]) -> None:
    """Raise ValueError unless the mix names known families with weights that can be drawn from."""
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"families: unknown {unknown}; expected some of {list(FAMILIES)}")
    if any(weight < 0 for weight in families.values()) or not (
        0 < sum(families.values()) < math.inf
    ):
        raise ValueError(
            f"families: expected finite non-negative weights, not all zero, got {dict(families)}"
        )


def questions(
    scene: Scene,
    families: Mapping[str, float],
    n: int,
    rng: random.Random,
    *,
    grid: int = 3,
) -> list[Question]:
    """Draw n questions about a scene, each family as often as its weight says.

    Args:
        families: {family: weight}.
        rng: the only source of chance.
        grid: the scene's cells per side, which decides their names.

    Raises:
        ValueError: unknown family or bad weight.
    """
    check_families(families)
    cells = cell_names(grid)
    drawn = rng.choices(list(families), weights=list(families.values()), k=n)
    return [_ASK[family](scene, cells, rng) for family in drawn]
