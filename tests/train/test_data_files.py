# SPDX-License-Identifier: Apache-2.0
"""What a run writes down of its data files, in each layout."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.data_files import check_data, facts_of


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def test_facts(tmp_path: Path) -> None:
    """JSON's content; of shards, which may be too large, and of streams the sizes."""
    folder = make(tmp_path / "a", "b.jsonl", "c.json", "image.png", "more/d.jsonl")
    shards = make(tmp_path / "t", "0.tar", "1.tar")
    hub = make(tmp_path / "h", "data/train-0.parquet", "README.md")
    saved = make(tmp_path / "s", "dataset_dict.json", "train/data.arrow", "test/data.arrow")
    found = facts_of([
        DataConfig(str(folder)), DataConfig(str(folder / "c.json")), DataConfig(str(shards)),
        DataConfig(str(hub)), DataConfig(str(saved)), DataConfig("org/name"),
    ])  # fmt: skip
    assert found == {
        str(folder): {"b.jsonl": sha("b.jsonl"), "c.json": sha("c.json")},
        str(folder / "c.json"): {"c.json": sha("c.json")},
        str(shards): {"0.tar": 5, "1.tar": 5},
        str(hub): {"data/train-0.parquet": 20},
        str(saved): {"dataset_dict.json": sha("dataset_dict.json"), "train/data.arrow": 16},
    }
    stream = DataConfig(str(folder), streaming=True)
    assert facts_of([stream]) == {str(folder): {"b.jsonl": 7, "c.json": 6}}


@pytest.mark.parametrize("change", ["changed", "is new", "is gone"])
def test_a_change_is_named(tmp_path: Path, change: str) -> None:
    shards = make(tmp_path / "t", "0.tar", "1.tar")
    data = [DataConfig(str(shards), "webdataset"), DataConfig("absent.json")]
    check_data(tmp_path, data, is_new=True)
    check_data(tmp_path, data, is_new=False)
    name = "2.tar" if change == "is new" else "1.tar"
    (shards / name).unlink() if change == "is gone" else (shards / name).write_bytes(b"other")
    if change == "changed":
        (shards / name).write_bytes(b"longer than before")
    with pytest.raises(ValueError, match=rf"other data: .*/t: {name} {change}; expected the same"):
        check_data(tmp_path, data, is_new=False)
    check_data(tmp_path, data, is_new=True)
    check_data(tmp_path, data, is_new=False)
