# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and their names as people see them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from prereg_kernels import apply_pre
from prereg_kernels._util.files import printable, write_whole
from prereg_kernels.attach.storage import load_heads
from tests.tiny import tiny_llava


def test_write_whole_replaces(tmp_path: Path) -> None:
    for content, expected in ((b"\xffone", b"\xffone"), ("öther", "öther".encode())):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, fill_disk: Callable[[], None]
) -> None:
    write_whole(tmp_path / "file", "old")
    fill_disk()
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "something new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers: neither renames before both have written."""
    barrier, write = Barrier(2), Path.write_bytes

    def write_and_wait(self: Path, content: bytes) -> None:
        write(self, content)
        barrier.wait(timeout=10)

    monkeypatch.setattr(Path, "write_bytes", write_and_wait)


@pytest.mark.usefixtures("together")
def test_two_at_once(tmp_path: Path) -> None:
    contents = b"one" * 1000, b"another"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda content: write_whole(tmp_path / "file", content), contents))
    assert (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("together")
def test_two_ranks_save(tmp_path: Path) -> None:
    """As under DDP, where all may call `pre.save`."""
    ranks = [apply_pre(tiny_llava()) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pre: pre.save(tmp_path), ranks))
    saved = load_heads(tmp_path).heads
    assert saved["2.weight_0"].equal(ranks[0].heads[2].weight_0)
    assert [path.name for path in tmp_path.iterdir()] == ["pre_heads.safetensors"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("images/größe 猫 🐈 [/b] $x^2$.png", "images/größe 猫 🐈 [/b] $x^2$.png"),
        ("\x1b]0;title\x07\x1b[31mred\x9b2J", r"\x1b]0;title\x07\x1b[31mred\x9b2J"),
        ("two\nlines\r\tand\u2028three", r"two\nlines\r\tand\u2028three"),
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\udce9.png"),
        (Path("a", "b"), "a/b"),
    ],
)
def test_printable(name: object, shown: str) -> None:
    assert printable(name) == shown
    printable(name).encode("utf-8")  # what a terminal or a page does next
