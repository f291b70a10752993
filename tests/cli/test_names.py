# SPDX-License-Identifier: Apache-2.0
"""Names and places as people type them: the command works there, or says in a line why not."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prereg_kernels.cli.commands import main
from prereg_kernels.demo.config import StageConfig, save_config
from tests.demo.tiny import tiny_run


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_config(replace(tiny_run(), stages=(StageConfig("a", steps=1),)), "run.yaml")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prereg", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_names_are_shown_and_not_acted_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "a[/b]\n\x1b[31m[red]"
    assert command(monkeypatch, "demo", "--config", "run.yaml", "--out", out) == 0
    said = capsys.readouterr().out
    shown = "model in a[/b]\\n\\x1b[31m[red]/checkpoints/step-00000001"
    assert shown in said.replace("\n", "") and "\x1b[31m" not in said
    assert Path(out, "checkpoints").is_dir()


PLACES = {
    "": "--out: expected a directory, got an empty name",
    "file": "file: expected a directory, got a file",
    "file/below": "Not a directory: 'file/below'",
    "loop": "loop: expected a directory, got a link that leads to none",
    "loop/below": "Too many levels of symbolic links: 'loop/below'",
    os.fsdecode(b"a\xff"): r"--out: expected a name in UTF-8, got a\udcff",
    "x" * 300: "File name too long",
    "/proc/nowhere": "'/proc/nowhere'",
}


@pytest.mark.parametrize("out", PLACES)
def test_places_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    assert command(monkeypatch, "demo", "--config", "run.yaml", "--out", out) == 2
    errors = capsys.readouterr().err
    assert PLACES[out] in errors and errors.count("\n") == 1
    assert Path("file").read_text() == "x"


def test_a_full_disk_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's own error of a write has no name."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert command(monkeypatch, "demo", "--config", "run.yaml", "--out", "out") == 2
    assert capsys.readouterr().err == "prereg: [Errno 28] No space left on device: 'out/.prereg'\n"


@pytest.mark.parametrize("name", ("[/b]", "meta", "cuda:99"))
def test_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert command(monkeypatch, "demo", "--config", "run.yaml", "--device", name) == 2
    errors = capsys.readouterr().err
    assert f"--device: '{name}' is not usable here" in errors and errors.count("\n") == 1


@pytest.mark.filterwarnings("default")
def test_a_damaged_tower_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("demo", "--config", "run.yaml", "--out", "out", "--fresh")
    assert command(monkeypatch, *arguments) == 0
    [tower] = Path("out").glob("tower-*")
    whole = {name: x.clone() for name, x in load_file(tower).items()}  # not a view of the file
    tower.write_bytes(tower.read_bytes()[:-1])
    capsys.readouterr()
    assert command(monkeypatch, *arguments) == 0
    errors = capsys.readouterr().err
    assert errors.startswith(f"prereg: {tower} is damaged: ") and errors.count("\n") == 1
    again = load_file(tower)
    assert again.keys() == whole.keys() and all(again[n].equal(x) for n, x in whole.items())
