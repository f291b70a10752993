# SPDX-License-Identifier: Apache-2.0
"""The checkup ends with a traceback, or clears my terminal, for the names of my files.

Names were read as markup by the console, as formulas by the plots, and as UTF-8 by the page. A name
is shown letter for letter; what would act on a terminal, and what is no text, as its escape.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from prereg_kernels.cli.commands import main
from tests.checkup.pictures import noise, save_folder, save_model

STRANGE = [b"[b]$..^^.png", b"\x1b[2J.png", b"caf\xe9.png", b"a\nb.png", b"\xf0\x9f\x90\x88.png"]
SHOWN = ["[b]$..^^.png", r"\x1b[2J.png", r"caf\udce9.png", r"a\nb.png", "\U0001f408.png"]


def test_every_name_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path, 2)
    folder = tmp_path / "images" / "\x1b]0;dark\x07"
    folder.mkdir()
    for seed, name in enumerate(STRANGE):
        Image.fromarray(noise(24, 40, seed)).save(folder / os.fsdecode(name))
        (folder / os.fsdecode(b"not " + name)).write_text("no image")
    save_model(tmp_path / "x[" / "b]")
    save_model(tmp_path / "$..^^")
    monkeypatch.chdir(tmp_path)
    arguments = ["x[/b]", "--compare", "$..^^", "--images", "images", "--splits", "1"]
    monkeypatch.setattr(sys, "argv", ["prereg", "diagnose", *arguments, "--out", "out"])
    main()
    out, err = capfd.readouterr()
    assert "b]: x[/b]" in out and "$..^^: $..^^" in out
    assert not {"\x1b", "\x07"} & {*out, *err}
    assert "Glyph" not in err
    numbers = json.loads((tmp_path / "out" / "checkup.json").read_text())
    assert [model["name"] for model in numbers["models"]] == ["b]", "$..^^"]
    skipped = numbers["models"][0]["skipped"]["damaged, or not an image"]
    assert sorted(skipped) == sorted(rf"\x1b]0;dark\x07/not {name}" for name in SHOWN)
    page = (tmp_path / "out" / "checkup.html").read_bytes().decode()
    assert r"\x1b]0;dark\x07/not " in page
    assert not any(ord(c) < 32 and c != "\n" for c in page)
