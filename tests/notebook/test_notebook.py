# SPDX-License-Identifier: Apache-2.0
"""The notebook of examples/ runs from nothing and shows something; what it stores is its own."""

from __future__ import annotations

import ast
import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.docs.pages import ROOT
from tests.notebook.cells import NOTEBOOK, code_cells, digest, read, text

CELLS = [text(cell["source"]) for cell in code_cells(read())]


def outputs(kind: str) -> list[str]:
    """All that is stored of a kind: a media type, or "text" of what was printed."""
    found = [output for cell in code_cells(read()) for output in cell["outputs"]]
    parts = [x.get("text") if kind == "text" else x.get("data", {}).get(kind) for x in found]
    return [text(part) for part in parts if part is not None]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a process of its own has run every cell with few steps."""
    out = tmp_path_factory.mktemp("ran")
    done = subprocess.run(
        [sys.executable, "-m", "tests.notebook.plain", str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(out)},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def facts(ran: Path) -> dict[str, Any]:
    return json.loads((ran / "facts.json").read_text())


def test_both_pictures_are_drawn(ran: Path) -> None:
    pictures = [Image.open(path) for path in sorted(ran.glob("*.png"))]
    assert len(pictures) == len(outputs("image/png")) == 2
    for picture in pictures:
        assert picture.width > 800 and len(set(picture.convert("L").tobytes())) > 50


def test_one_model_has_pre_while_it_trains(facts: dict[str, Any]) -> None:
    """From the same weights; its loss falls, and it is off when what came of it is measured."""
    assert facts["attached"] == {"baseline": False, "regularized": True}
    assert facts["alike before"] and not facts["alike after"]
    losses = facts["pre_loss"]
    assert losses["without"] == [] and losses["with_pre"][-1] < losses["with_pre"][0] - 0.1
    assert facts["left"] == [False, False]


def test_both_are_measured(facts: dict[str, Any]) -> None:
    """At the input and at PRe's layer; and after a lesson of the frozen kind."""
    assert [result["variant"] for result in facts["results"]] == ["baseline", "pre"]
    for result in facts["results"]:
        assert all(set(at) == {"0", "4"} for at in result["probe"].values())
        [(frozen, [(scenes, answers)])] = [(k, v.items()) for k, v in result["transfer"].items()]
        assert (frozen, scenes) == ("projector", "64")
        assert 0 <= answers["texture"]["accuracy"] <= 1
    first, second = (result["probe"] for result in facts["results"])
    assert first != second
    assert f"texture: baseline {100 * first['texture']['4']:.1f}%" in facts["words"][0]


def test_what_is_stored_is_of_this_code() -> None:
    """`make notebook` writes it, and never a hand: run it after each change of a cell."""
    assert read()["metadata"]["digest"] == digest(read())


def test_what_is_stored_is_whole_and_of_no_machine() -> None:
    """Pictures and words; no error, no warning, no time, no path, no version."""
    notebook = read()
    assert NOTEBOOK.stat().st_size < 400_000
    assert notebook["metadata"].keys() == {"digest", "kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for number, cell in enumerate(code_cells(notebook), 1):
        assert cell["execution_count"] == number and cell["metadata"].keys() <= {"tags"}
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result")
            assert output.get("name", "stdout") == "stdout"
    for picture in outputs("image/png"):
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    words = " ".join((*outputs("text"), *outputs("text/plain")))
    assert "PRe's own loss" in words and "Probes at layer 4." in words
    assert not any(part in words for part in ("/", "object at 0x", "Warning"))


def test_cells_are_short_and_mark_the_lines_of_pre() -> None:
    """Those to copy. Plain Python, as this test runs it."""
    lines = [line for cell in CELLS for line in cell.splitlines()]
    assert all(len(cell.splitlines()) <= 15 for cell in CELLS)
    assert not any(line.lstrip().startswith(("%", "!")) for line in lines)
    marked = [line for line in lines if "# PRe" in line]
    calls = [line for line in lines if "import apply_pre" in line or "_pre(regularized" in line]
    assert marked == calls and len(marked) == 3
    [cell] = [cell for cell in CELLS if "apply_pre(" in cell]
    assert len(ast.parse(cell).body) == 2


def test_the_lines_of_pre_are_what_the_demo_does() -> None:
    """Layer, weight and anchor are spelled out for the reader, and are the preset's."""
    from prereg_kernels.cli.demo import load_preset

    pre = load_preset("scenes").run.pre
    call = f'apply_pre(regularized, layers={pre.layer}, weight={pre.weight}, anchor="{pre.anchor}")'
    assert sum(call in cell for cell in CELLS) == 1 and pre.token_fraction == 1
