# SPDX-License-Identifier: Apache-2.0
"""`prereg diagnose` prints a traceback when a file of labels or annotations is broken.

Long fields, deep nesting, infinite numbers and other encodings raised errors of the readers, which
nobody caught or which named no file. Each is one line that names the file, and exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prereg_kernels.cli.commands import main
from tests.checkup.pictures import save_folder


@pytest.mark.parametrize(
    ("option", "name", "content"),
    [
        ("--labels", "long.csv", b"a.png," + 200_000 * b"x"),
        ("--labels", "cp1252.csv", b"caf\xe9.png,cat\n"),
        ("--labels", "deep.json", 200_000 * b'{"a":'),
        ("--labels", "utf16.json", '{"a": "cat"}'.encode("utf-16")),
        ("--masks", "deep.json", 200_000 * b'{"a":'),
        ("--masks", "infinite.json", b'{"categories": [{"id": Infinity, "name": "cat"}]}'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_line_names_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
    content: bytes,
) -> None:
    images = save_folder(tmp_path, 2) / "images"
    (tmp_path / name).write_bytes(content)
    arguments = ["model", "--images", images, "--out", tmp_path / "out", option, tmp_path / name]
    monkeypatch.setattr(sys, "argv", ["prereg", "diagnose", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"prereg: {tmp_path / name}:")
