"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prereg_kernels.files import write_whole


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
