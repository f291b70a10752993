# SPDX-License-Identifier: Apache-2.0
"""Numbers in sentences and tables, with a real minus sign."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prereg_kernels.checkup.intervals import Estimate

MINUS = "−"


def fixed(value: float, digits: int = 3) -> str:
    """With so many decimals, and no minus sign before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def figure(value: float, unit: str) -> str:
    """A number of a table; "%" is the unit of shares."""
    if not math.isfinite(value):
        return "–"
    if unit == "%":
        return f"{100 * value:.1f}%"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def over_depth(values: Sequence[float], layer: int, unit: str) -> str:
    """A curve in words: at the input, at the layer that is spoken of, and at the last."""
    last = len(values) - 1
    places = {0: "at the input"}
    places |= {depth: f"at layer {depth}" for depth in (layer, last) if depth}
    return ", ".join(f"{figure(values[depth], unit)} {where}" for depth, where in places.items())


def points(change: Estimate) -> str:
    """A difference of accuracies in percentage points, with its interval."""
    text = f"{100 * change.value:+.1f} points{_range(change, 100, '+.1f')}"
    return text.replace("-", MINUS)


def number(change: Estimate) -> str:
    """A difference with its interval."""
    return f"{change.value:+.3f}{_range(change, 1, '+.3f')}".replace("-", MINUS)


def plain(value: Estimate) -> str:
    """A value with its interval."""
    return f"{value.value:.3f}{_range(value, 1, '.3f')}".replace("-", MINUS)


def short(change: Estimate, scale: float, digits: int) -> str:
    """A difference with its interval, for little space."""
    value, low, high = (scale * x for x in (change.value, change.low, change.high))
    text = f"{value:+.{digits}f}"
    if not math.isnan(low):
        text += f" ({low:+.{digits}f} to {high:+.{digits}f})"
    return text.replace("-", MINUS)


def plus_minus(value: Estimate, scale: float, digits: str) -> str:
    """A difference and half its interval, with a hyphen as minus sign."""
    return f"{scale * value.value:+{digits}}{spread(scale * value.half_width, digits)}"


def spread(value: float, digits: str) -> str:
    """What stands after a number; nothing where there is none."""
    return "" if math.isnan(value) else f" ± {value:{digits}}"


def verdict(
    change: Estimate, rise: str, fall: str, unclear: str, unknown: str | None = None
) -> str:
    """What may be said of a change: a direction only where its interval excludes 0.

    Args:
        unknown: where there is no interval; None: as unclear.
    """
    if unknown is not None and math.isnan(change.low):
        return unknown
    return {1: rise, -1: fall, 0: unclear}[change.direction]


NO_INTERVAL = "with no interval to judge it by"


def moved(change: Estimate) -> str:
    """Of one model over depth."""
    return verdict(change, "a rise", "a fall", "no clear change", NO_INTERVAL)


def apart(change: Estimate) -> str:
    """Of two models."""
    return verdict(change, "higher", "lower", "no clear difference", NO_INTERVAL)


def verb(change: Estimate) -> str:
    """Of one model over depth, after its subject."""
    unknown = "goes up" if change.value > 0 else "goes down"
    return verdict(change, "rises", "falls", "does not clearly change", unknown)


def _range(x: Estimate, scale: float, digits: str) -> str:
    if math.isnan(x.low):
        return ""
    return f" (95% interval {scale * x.low:{digits}} to {scale * x.high:{digits}})"
