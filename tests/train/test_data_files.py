# SPDX-License-Identifier: Apache-2.0
"""What a run writes down of its data files, in each layout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.data_files import DATA_FILES, check_data, facts_of


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


ROWS = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(4)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save(path: Path, count: int = 4, **options: Any) -> None:
    datasets.Dataset.from_list(ROWS[:count]).save_to_disk(str(path), **options)


def test_facts(tmp_path: Path) -> None:
    """JSON's content; of shards, which may be too large, and of streams the sizes."""
    folder = make(tmp_path / "a", "b.jsonl", "c.json", "image.png", "data/d.jsonl", "train/e.json")
    shards = make(tmp_path / "t", "0.tar", "1.tar", "2.json", "data/3.tar")
    hub = make(tmp_path / "h", "data/train-0.parquet", "data/test-0.parquet", "README.md")
    deep = make(tmp_path / "d", "x/y/0.parquet", "x/y/1.parquet")
    found = facts_of([
        DataConfig(str(folder)), DataConfig(str(folder / "c.json"), "llava"),
        DataConfig(str(shards), "webdataset"), DataConfig(str(shards / "0.tar"), "webdataset"),
        DataConfig(str(hub)), DataConfig(str(deep), "llava"),
        DataConfig(str(hub / "data" / "test-0.parquet"), streaming=True),
    ])  # fmt: skip
    assert found == {
        str(folder): {"b.jsonl": sha("b.jsonl"), "c.json": sha("c.json")},
        str(folder / "c.json"): {"c.json": sha("c.json")},
        str(shards): {"0.tar": 5, "1.tar": 5},
        str(shards / "0.tar"): {"0.tar": 5},
        str(hub): {"data/train-0.parquet": 20},
        str(deep): {"x/y/0.parquet": 13, "x/y/1.parquet": 13},
        str(hub / "data" / "test-0.parquet"): {"test-0.parquet": 19},
    }
    stream = DataConfig(str(folder), streaming=True)
    assert facts_of([stream]) == {str(folder): {"b.jsonl": 7, "c.json": 6}}
    both = {str(folder): {"b.jsonl": sha("b.jsonl"), "c.json": sha("c.json")}}
    assert facts_of([DataConfig(str(folder)), stream]) == both


@pytest.mark.parametrize(
    ("split", "names"),
    [("train", ["train"]), ("test", ["test"]), ("train[:9] + test", ["test", "train"]),
     ("all", ["test", "train"])],
)  # fmt: skip
def test_splits_of_a_folder(tmp_path: Path, split: str, names: list[str]) -> None:
    """A symbolic link to it has the names that it has itself."""
    folder = make(tmp_path / "h", "data/train-0.parquet", "data/test-0.parquet")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        [found] = facts_of([DataConfig(str(path), split=split)]).values()
        assert sorted(found) == [f"data/{name}-0.parquet" for name in names]


PARQUET = {"train-0.parquet": 15, "train-1.parquet": 15}


@pytest.mark.parametrize(
    ("glob", "folder"),
    [("{here}/a/b/pq/train-*.parquet", ""), ("./a/b/pq/*.parquet", ""), ("a/b/pq/*.parquet", ""),
     ("a/*/pq/train-[01].parquet", "b/pq/"), ("a/**/*.parquet", "b/pq/"),
     ("file://{here}/a/b/pq/train-?.parquet", "")],
)  # fmt: skip
def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glob: str, folder: str) -> None:
    """The files that there are, as of folders; one more is told of."""
    make(tmp_path / "a" / "b" / "pq", *PARQUET, "notes.json")
    monkeypatch.chdir(tmp_path)
    data = [DataConfig(glob.format(here=tmp_path))]
    assert facts_of(data) == {data[0].path: {folder + name: 15 for name in PARQUET}}
    check_data(tmp_path, data, is_new=True)
    (tmp_path / "a/b/pq/train-1.parquet").write_bytes(b"changed")
    with pytest.raises(ValueError, match=rf": {folder}train-1\.parquet changed; expected the same"):
        check_data(tmp_path, data, is_new=False)


@pytest.mark.parametrize(
    "name",
    ["org/name", "hf://datasets/o/n/data/*.parquet", "https://h/0.parquet", "s3://h/0.parquet",
     "absent.json", "absent/*.parquet"],
)  # fmt: skip
def test_what_is_elsewhere(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nobody is asked for it."""
    if "absent" not in name:
        monkeypatch.delattr(datasets, "load_dataset_builder")
    assert facts_of([DataConfig(name)]) == {}


def test_a_format_that_names_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads JSON."""
    monkeypatch.delattr("prereg_kernels.train.sources.webdataset.files_of")
    folder = str(make(tmp_path / "a", "b.json", "0.tar"))
    assert facts_of([DataConfig(folder, "webdataset")]) == {folder: {"b.json": sha("b.json")}}


def test_caches_beside_a_saved_data_set(tmp_path: Path) -> None:
    """What a script leaves there is not read."""
    save(tmp_path / "saved", num_shards=2)
    data = [DataConfig(str(tmp_path / "saved"))]
    check_data(tmp_path, data, is_new=True)
    assert set(facts_of(data)[data[0].path]) == {
        "data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "dataset_info.json", "state.json"
    }  # fmt: skip
    datasets.load_from_disk(data[0].path).map(lambda row: {"length": len(row["messages"])})
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 1
    check_data(tmp_path, data, is_new=False)


def test_json_of_deeper_folders(tmp_path: Path) -> None:
    """The source does not read it."""
    mix = make(tmp_path / "mix", "a.json")
    check_data(tmp_path, [DataConfig(str(mix))], is_new=True)
    make(mix, "data/notes.json", "train/notes.jsonl")
    check_data(tmp_path, [DataConfig(str(mix))], is_new=False)
    make(mix, "b.json")
    with pytest.raises(ValueError, match=r"mix: b\.json is new; expected the same"):
        check_data(tmp_path, [DataConfig(str(mix))], is_new=False)


@pytest.mark.parametrize("changed", ["train", "test", "extra"])
def test_two_splits_of_a_path(tmp_path: Path, changed: str) -> None:
    """Both are compared, and no third."""
    for split in ("train", "test", "extra"):
        save(tmp_path / "dd" / split)
    (tmp_path / "dd" / "dataset_dict.json").write_text('{"splits": ["train", "test", "extra"]}')
    data = [DataConfig(str(tmp_path / "dd"), split=split) for split in ("train", "test")]
    check_data(tmp_path, data, is_new=True)
    assert len(facts_of(data)[data[0].path]) == 6
    [arrow] = (tmp_path / "dd" / changed).glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes() + b"more")
    if changed == "extra":
        check_data(tmp_path, data, is_new=False)
        return
    with pytest.raises(ValueError, match=rf"dd: {changed}/data-.*\.arrow changed; expected the"):
        check_data(tmp_path, data, is_new=False)


def test_an_older_run(tmp_path: Path) -> None:
    """Without the file it goes on, and has it from then on."""
    data = [DataConfig(str(make(tmp_path / "a", "b.jsonl")))]
    check_data(tmp_path, data, is_new=False)
    written = json.loads((tmp_path / DATA_FILES).read_text())
    assert written == {data[0].path: {"b.jsonl": sha("b.jsonl")}}


def test_a_folder_that_was_empty(tmp_path: Path) -> None:
    """No run has read it: its files are not new to one."""
    (tmp_path / "a").mkdir()
    data = [DataConfig(str(tmp_path / "a"))]
    check_data(tmp_path, data, is_new=True)
    make(tmp_path / "a", "b.jsonl")
    check_data(tmp_path, data, is_new=False)
    (tmp_path / "a" / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"a: b\.jsonl is gone; expected the same"):
        check_data(tmp_path, data, is_new=False)


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
