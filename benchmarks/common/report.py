# SPDX-License-Identifier: Apache-2.0
"""What results say, whoever measured them: summaries, bars, tables, and the file they are in."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from prereg_kernels._util.files import write_whole

Json = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"


def write_json(results: Any, path: Path) -> None:
    """The whole file or none of it; lists of numbers on one line."""
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[[-+.\deE,\s]+\]", lambda found: " ".join(found[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text + "\n")


def made_on(machine: Json) -> str:
    """The processor, torch and the commit of a result, as `describe_machine` gave them."""
    dirty = " (dirty)" if machine["dirty"] else ""
    return f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}{dirty}"


def summarize_variant(samples: Sequence[float]) -> Json:
    """The median and the quartiles of samples in milliseconds, with the samples."""
    ordered = sorted(samples)
    return {
        "status": "ok",
        "median_ms": statistics.median(ordered),
        "quartiles_ms": [ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]],
        "samples_ms": [round(sample, 5) for sample in samples],
    }


def is_timed(variant: Json | None) -> TypeGuard[Json]:
    return variant is not None and variant["status"] == "ok"


def fastest(variants: Json, names: Iterable[str]) -> float | None:
    """The smallest median among those that were timed."""
    medians = [variants[n]["median_ms"] for n in names if is_timed(variants.get(n))]
    return min(medians, default=None)


def bar(
    name: str, limit: float, aim: float | None, measured: float | None, at_least: bool, unit: str
) -> Json:
    """One bar: the measured value, None if there is none, must not be above (below) the limit."""

    def reaches(goal: float | None) -> bool | None:
        if measured is None or goal is None:
            return None
        return measured >= goal if at_least else measured <= goal

    return {
        "name": name,
        "bar": limit,
        "aim": aim,
        "measured": measured,
        "at_least": at_least,
        "unit": unit,
        "met": reaches(limit),
        "aim_met": reaches(aim),
    }


def bar_lines(found: Iterable[Json]) -> list[str]:
    """A heading, and a line for each bar."""
    heading = f"{'performance':<46}{'bar':>8}{'aim':>8}{'measured':>10}"
    return [heading, *map(_bar_line, found)]


def _bar_line(found: Json) -> str:
    sign = ">=" if found["at_least"] else "<="
    aim = "" if found["aim"] is None else f"{found['aim']:.2f}"
    if found["measured"] is None:
        return f"{found['name']:<46}{sign}{found['bar']:>6.2f}{aim:>8}{'-':>10}  not measured"
    verdict = "met" if found["met"] else "MISSED"
    verdict += ", aim met" if found["aim_met"] else ""
    measured = f"{found['measured']:.2f}{found['unit']}"
    return f"{found['name']:<46}{sign}{found['bar']:>6.2f}{aim:>8}{measured:>10}  {verdict}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Aligned in the source too; the first `left` columns to the left, the others right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]

    def cells(line: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([cells(head), cells(rule), *map(cells, rows)])
