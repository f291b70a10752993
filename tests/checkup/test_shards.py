# SPDX-License-Identifier: Apache-2.0
"""Shards: whole or not there, never of other settings, and a full disk says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from prereg_kernels.checkup.shards import Shards


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
    path = shards.directory / "one.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not shards.has("one")
    path.with_name("one.safetensors.tmp").write_bytes(whole)
    path.unlink()
    assert not shards.has("one")


def test_a_flipped_bit_or_a_foreign_file_does_not_count(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    shards.write("one", {"table": torch.ones(100)}, {"names": ["abc"]})
    path = shards.directory / "one.safetensors"
    whole = path.read_bytes()
    for at in (whole.index(b"abc"), len(whole) - 1, len(whole) - 200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not shards.has("one"), at
    path.write_bytes(save({"table": torch.ones(100)}))
    assert not shards.has("one")
    path.write_bytes(whole)
    assert shards.has("one")


def test_shards_of_other_settings_are_others(tmp_path: Path) -> None:
    first = Shards(tmp_path, {"data": "a", "images": 3})
    assert first.changed == []
    first.write("one", {}, {})
    other = Shards(tmp_path, {"data": "a", "images": 4})
    assert other.changed == ["images"] and not other.has("one")
    more = Shards(tmp_path, {"data": "b", "images": 4, "masks": "b"})
    assert more.changed == ["data", "masks"] and not more.has("one")
    assert not Shards(tmp_path, {"images": 4, "data": "a"}).has("one")  # their order counts too
    again = Shards(tmp_path, {"data": "a", "images": 3})
    assert again.changed == [] and again.has("one")
    Shards.clear(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not Shards(tmp_path, {"data": "a", "images": 3}).has("one")


@pytest.mark.parametrize("content", [b"", b'{"x": ', b"\xff\xfe", b"[]", b"null"])
def test_damaged_settings_say_nothing(tmp_path: Path, content: bytes) -> None:
    shards = Shards(tmp_path, {"x": 1})
    shards.write("one", {}, {})
    (shards.directory / "settings.json").write_bytes(content)
    assert Shards(tmp_path, {"x": 2}).changed == []
    assert Shards(tmp_path, {"x": 1}).has("one")
    assert (shards.directory / "settings.json").read_text() == '{\n "x": 1\n}'


def test_clearing_leaves_what_is_not_ours(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    shards.write("one", {}, {})
    precious = [
        tmp_path / "precious",
        tmp_path / "settings.json",
        tmp_path / "notes" / "settings.json",
        tmp_path / "copy" / "one.safetensors",
        shards.directory / "one.safetensors.bak",
        tmp_path / ("0" * 16) / "one.safetensors",
    ]
    for path in precious:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    Shards.clear(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(precious)
    assert all(path.read_text() == "mine" for path in precious)


def test_a_full_disk_is_named(tmp_path: Path, fill_disk: Callable[[], None]) -> None:
    shards = Shards(tmp_path, {})
    fill_disk()
    with pytest.raises(OSError, match=r"could not write .*one\.safetensors: No space left.*again"):
        shards.write("one", {"table": torch.ones(3)}, {})
    assert not shards.has("one")
    assert sorted(path.name for path in shards.directory.iterdir()) == ["settings.json"]
