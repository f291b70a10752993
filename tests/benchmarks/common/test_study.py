# SPDX-License-Identifier: Apache-2.0
"""The command line of a study: measured with its counts, kept in a file, shown as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.study import run_study


def test_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --table nothing is measured."""
    folders: list[Path] = []

    def measure(folder: Path, samples: int, steps: int) -> dict[str, Any]:
        assert folder.is_dir()
        folders.append(folder)
        return {"product": samples * steps}

    def start(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["study", *arguments])
        out = tmp_path / "study.json"
        run_study("A study.", measure, lambda r: f"{r['measured']}", out, samples=5, steps=7)
        return capsys.readouterr().out

    assert start("--samples", "3") == "{'product': 21}\n"
    [folder] = folders
    assert not folder.exists()
    written = json.loads((tmp_path / "study.json").read_text())
    assert written["measured"] == {"product": 21} and "commit" in written["machine"]
    assert start("--table") == "{'product': 21}\n" and len(folders) == 1
