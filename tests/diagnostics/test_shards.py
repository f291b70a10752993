"""Shards: whole or not there, never of other settings, and a full disk says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prereg_kernels.diagnostics.shards import Shards


def test_what_was_written_is_read(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "a", {"x": 1})
    table = torch.arange(12.0).reshape(3, 4)
    assert not shards.has("one")
    shards.write("one", {"table": table, "half": table.bfloat16()}, {"names": ["ä"]})
    again = Shards(tmp_path / "a", {"x": 1})
    assert again.has("one")
    assert again.facts("one") == {"names": ["ä"]}
    assert again.read("one", "table").equal(table)
    assert again.layer("one", "half", 1).equal(table[1].bfloat16())
    assert again.get("one", "absent") is None


def test_a_partial_shard_does_not_count(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    shards.write("one", {"table": torch.ones(100)}, {})
    path = tmp_path / "one.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not shards.has("one")
    (tmp_path / "one.safetensors.tmp").write_bytes(whole)
    path.unlink()
    assert not shards.has("one")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Shards(tmp_path, {"data": "a", "images": 3}).write("one", {}, {})
    with pytest.raises(ValueError, match="holds a checkup with another images; expected the same"):
        Shards(tmp_path, {"data": "a", "images": 4})
    with pytest.raises(ValueError, match="another masks"):
        Shards(tmp_path, {"data": "a", "images": 3, "masks": "b"})
    Shards.clear(tmp_path)
    assert not Shards(tmp_path, {"images": 4}).has("one")


def test_clearing_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    Shards.clear(tmp_path)
    assert (tmp_path / "precious").exists()


def test_a_full_disk_is_named(tmp_path: Path, fill_disk: Callable[[], None]) -> None:
    shards = Shards(tmp_path, {})
    fill_disk()
    with pytest.raises(OSError, match=r"could not write .*one\.safetensors: No space left.*again"):
        shards.write("one", {"table": torch.ones(3)}, {})
    assert not shards.has("one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json"]
