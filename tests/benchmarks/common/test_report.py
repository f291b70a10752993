# SPDX-License-Identifier: Apache-2.0
"""Summaries, bars, files and tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.common.report import bar, markdown_table, summarize_variant, write_json


def test_summary() -> None:
    summary = summarize_variant([4.0, 1.0, 2.0, 3.0, 100.0])
    assert summary["median_ms"] == 3.0
    assert summary["quartiles_ms"] == [2.0, 4.0]
    assert summary["samples_ms"] == [4.0, 1.0, 2.0, 3.0, 100.0]


@pytest.mark.parametrize(
    ("measured", "at_least", "met", "aim_met"),
    (
        (1.15, False, True, False),
        (1.16, False, False, False),
        (1.05, False, True, True),
        (None, False, None, None),
        (math.nan, False, False, False),
    ),
)
def test_bar(measured: float | None, at_least: bool, met: object, aim_met: object) -> None:
    found = bar("time", 1.15, 1.05, measured, at_least, "")
    assert (found["met"], found["aim_met"]) == (met, aim_met)


def test_write_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "gpu.json"
    write_json({"x": 1}, path)
    with pytest.raises(TypeError):
        write_json({"x": object()}, path)
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]


def test_markdown_table() -> None:
    assert markdown_table(["name", "n"], [["a", "10"]], left=1).splitlines() == [
        "| name |   n |",
        "| ---- | --: |",
        "| a    |  10 |",
    ]
