# SPDX-License-Identifier: Apache-2.0
"""Data sets of the library `datasets`: saved on the disk, as Parquet files, or on the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prereg_kernels._util import private
from prereg_kernels._util.files import printable, read_json
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.names import check_name, is_pattern
from prereg_kernels.train.sample import BadSampleError, Sample, check_messages

_JSON = (".json", ".jsonl")
_STATE, _INFO = "state.json", "dataset_info.json"
_SAVED = (_INFO, "dataset_dict.json")


@dataclass(frozen=True)
class Columns:
    """What a format's conversations are in a row.

    Attributes:
        name: of their column.
        messages: of a row. Raises BadSampleError where there are none.
        shape: (characters of text, images) of what is in the column, whatever it is.
    """

    name: str
    messages: Callable[[Mapping[str, Any]], Any]
    shape: Callable[[Any], tuple[int, int]]


def is_json(path: Path) -> bool:
    """Whether it is JSON or JSONL files, and no data set of the library's."""
    if path.suffix in _JSON:
        return True
    if not path.is_dir() or _is_saved(path):
        return False
    has_parquet = any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))
    return any(path.glob("*.json*")) and not has_parquet


def _is_saved(path: Path) -> bool:
    return any((path / name).exists() for name in _SAVED)


class DatasetSource:
    """Rows of a data set, whose images are taken as they are stored: the collator opens them. With
    `streaming` it is a Stream.

    Raises:
        ValueError: it has no such column, or cannot be read.
    """

    def __init__(self, data: DataConfig, columns: Columns) -> None:
        import datasets

        if not is_pattern(data.path):
            check_name("data", data.path)
        path = Path(data.path)
        self._name, self._columns = printable(data.path), columns
        cache = Path(datasets.config.HF_CACHE_HOME)
        self._root = Path(data.images) if data.images else path if path.is_dir() else cache
        try:
            dataset = _load(data)
        except (
            FileNotFoundError, ValueError, datasets.exceptions.DatasetsError,
            ImportError,  # of what reads https:// or s3://
        ) as error:  # fmt: skip
            raise ValueError(f"{self._name}: {' '.join(str(error).split())}") from None
        names = dataset.column_names
        if names is not None and columns.name not in names:
            raise ValueError(
                f"{self._name}: expected a column {columns.name}, got {', '.join(names)}"
            )
        self.rows: Any = None
        if data.streaming:
            self.rows = dataset.decode(False)
            return
        self._table = dataset.with_format("arrow")
        shapes = [columns.shape(row[columns.name]) for row in dataset.select_columns(columns.name)]
        self.lengths = np.array([length for length, _ in shapes], dtype=np.int64)
        self.images = np.array([images for _, images in shapes], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._table)

    def where(self, number: int) -> str:
        """The data set and row of a sample."""
        return f"{self._name}[{number}]"

    def __getitem__(self, number: int) -> Sample:
        """A sample. Raises BadSampleError where it cannot be used."""
        [row] = self._table[[number]].to_pylist()
        return self._sample(row, self.where(number))

    def row_shape(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """(characters of text, images)."""
        return self._columns.shape(row.get(self._columns.name))

    def row_sample(self, row: Mapping[str, Any]) -> Sample:
        """A sample. Raises BadSampleError where it cannot be used."""
        return self._sample(row, self.row_where(row) or self._name)

    def row_where(self, row: Mapping[str, Any]) -> str | None:
        """The data set and the row's id, if it has one."""
        return f"{self._name}: id {printable(str(row['id']))}" if row.get("id") else None

    def _sample(self, row: Mapping[str, Any], where: str) -> Sample:
        images = [_stored(image) for image in images_of(row)]
        messages = check_messages(self._columns.messages(row), len(images))
        return Sample(where, messages, images, self._root)


def _load(data: DataConfig) -> Any:
    import datasets

    path = Path(data.path)
    if _is_saved(path):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[data.split]
        return saved.to_iterable_dataset() if data.streaming else saved
    return datasets.load_dataset(**_wanted(data), split=data.split, streaming=data.streaming)


def _wanted(data: DataConfig) -> dict[str, Any]:
    if Path(data.path).suffix == ".parquet":
        return {"path": "parquet", "data_files": {data.split: data.path}}
    return {"path": data.path}


def dataset_files(data: DataConfig) -> list[Path]:
    """The files on the disk that its rows come from; none of what is elsewhere.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they cannot be told.
    """
    import datasets

    path = Path(data.path)
    if path.is_file():
        return [path]
    if _is_saved(path):
        return _saved_files(path, data.split)
    is_elsewhere = "://" in data.path and not data.path.startswith("file://")
    is_searched = path.suffix == ".parquet" and is_pattern(data.path) and not is_elsewhere
    if not (path.is_dir() or is_searched):
        return []
    builder = datasets.load_dataset_builder(**_wanted(data))
    by_split = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    wanted = {part.partition("[")[0].strip() for part in data.split.split("+")}  # train[:9]+test
    files = [file for name in wanted & by_split.keys() for file in by_split[name]]
    files = files or [file for several in by_split.values() for file in several]
    on_disk = [file for file in files if "://" not in file]
    if is_searched:
        return [Path(file) for file in on_disk]
    return [path / os.path.relpath(file, path.resolve()) for file in on_disk]


def _saved_files(path: Path, split: str) -> list[Path]:
    """Those that its state names: scripts leave caches beside them."""
    folder = path if (path / _STATE).is_file() else path / split
    state = folder / _STATE
    named = read_json(state, "the state of a data set").get(private.SAVED_FILES, [])
    return [state, folder / _INFO, *(folder / each["filename"] for each in named)]


def images_of(record: Mapping[str, Any]) -> list[Any]:
    """What stands under "images", or "image"."""
    images = record.get("images", record.get("image"))
    if images is None or images == "":
        return []
    return images if isinstance(images, list) else [images]


def _stored(image: Any) -> Any:
    """An image as the library stores it: {"bytes", "path"}."""
    if isinstance(image, Mapping):
        content = image.get("bytes")
        image = content if content is not None else image.get("path")
    if not isinstance(image, (str, bytes)):
        raise BadSampleError("images: expected images, or paths of them")
    return image
