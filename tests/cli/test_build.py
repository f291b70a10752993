# SPDX-License-Identifier: Apache-2.0
"""prereg build: what it compiles, what it says, and how it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from prereg_kernels.cli import build, commands
from prereg_kernels.ops.backends import cpp_build
from prereg_kernels.ops.backends.cpp_build import RECORD, library


def run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prereg", "build"])
    commands.main()


def set_up(monkeypatch: pytest.MonkeyPatch, place: Path, source: str, **record: Any) -> None:
    """A source of a line, two variants, and what the package finds after the build."""
    (place / "csrc").mkdir()
    (place / "csrc" / "rows.cpp").write_text(source)
    monkeypatch.setattr(cpp_build, "VARIANTS", {"base": "-O0", "avx2": "-O0 -DWIDE"})
    monkeypatch.setattr(build, "CSRC", place / "csrc")
    monkeypatch.setattr(build, "build_folders", lambda: (place / "lib", place / "objects"))
    monkeypatch.setattr(build, "unavailable", lambda device: record.get("reason"))
    monkeypatch.setattr(build, "describe", lambda: record)


def test_compiles_and_says_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the real torch; a variant fails."""
    source = "int f() { return 1; }\n#ifdef WIDE\n#error too wide\n#endif\n"
    set_up(monkeypatch, tmp_path, source, variant="base")
    run(monkeypatch)
    record = json.loads((tmp_path / "lib" / RECORD).read_text())
    assert record["variants"] == ["base"]
    assert (tmp_path / "lib" / library("base")).is_file()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("avx2 left out: ") and lines[0].endswith("#error too wide")
    assert lines[1] == f"base: built against torch {record['torch']}, in {tmp_path / 'lib'}"
    assert lines[2] == "this CPU runs base"


@pytest.mark.parametrize(
    ("compiler", "record", "told"),
    (
        ("/nowhere/c++", {}, "prereg: no C++ compiler: /nowhere/c++ is not on the PATH"),
        ("c++", {"reason": "its library does not load"}, "prereg: its library does not load"),
    ),
)
def test_failure_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compiler: str,
    record: dict[str, str],
    told: str,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    torch = {"version": "2.13.0", "includes": [], "libraries": [], "abi": 1, "openmp": False}
    monkeypatch.setattr(cpp_build, "find_torch", lambda: torch)
    monkeypatch.setattr(cpp_build, "_run_ninja", lambda *arguments: {})
    set_up(monkeypatch, tmp_path, "", **record)
    (tmp_path / "objects").mkdir()
    for variant in cpp_build.VARIANTS:
        (tmp_path / "objects" / library(variant)).touch()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"{told}\n"


def test_a_package_without_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    with pytest.raises(SystemExit):
        run(monkeypatch)
    told = f"prereg: the sources of the C++ kernels are not there: {tmp_path / 'csrc'}\n"
    assert capsys.readouterr().err == told
