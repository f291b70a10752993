"""TRL's conversational vision format: {"messages": [...], "images": [...]}.

A content is text, or a list of parts as {"type": "text", "text": ...} and {"type": "image"}. Local
JSON files hold paths of images; data sets, on the disk or on the hub, hold images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prereg_kernels._util.files import printable
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sample import BadSampleError, Sample, check_messages
from prereg_kernels.train.source import JsonSource, Source


class MessagesSource(JsonSource):
    """Of local JSON files."""

    def shape(self, record: dict[str, Any]) -> tuple[int, int]:
        """(characters of text, images)."""
        return _characters(record.get("messages")), len(_images(record))

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """The sample of a record."""
        images = _images(record)
        if any(not isinstance(image, str) for image in images):
            raise BadSampleError("images: expected a list of paths")
        messages = check_messages(record.get("messages"), len(images))
        return Sample(where, messages, images, self.root)


class DatasetSource:
    """Of a data set of the library `datasets`: saved by it, in its files, or on the hub.

    Raises:
        ValueError: it has no column "messages".
    """

    def __init__(self, data: DataConfig, dataset: Any) -> None:
        if "messages" not in dataset.column_names:
            raise ValueError(
                f"{printable(data.path)}: expected a column messages, got "
                f"{', '.join(dataset.column_names)}"
            )
        self._name, self._rows = printable(data.path), dataset
        messages = dataset.select_columns("messages")
        self.lengths = np.array([_characters(row["messages"]) for row in messages], dtype=np.int64)
        self.images = np.array([_placeholders(row["messages"]) for row in messages], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, number: int) -> str:
        """The data set and row of a sample."""
        return f"{self._name}[{number}]"

    def __getitem__(self, number: int) -> Sample:
        """A sample. Raises BadSampleError where it cannot be used."""
        try:
            row = self._rows[number]
        except Exception as error:  # whatever decoders raise
            raise BadSampleError(f"images: {type(error).__name__}: {error}") from None
        images = _images(row)
        return Sample(self.where(number), check_messages(row["messages"], len(images)), images)


def _images(record: Mapping[str, Any]) -> list[Any]:
    images = record.get("images", record.get("image"))
    if images is None:
        return []
    return images if isinstance(images, list) else [images]


def _contents(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        return []
    return [message.get("content") for message in messages if isinstance(message, dict)]


def _characters(messages: Any) -> int:
    total = 0
    for content in _contents(messages):
        for part in [content] if isinstance(content, str) else content or []:
            text = part.get("text") if isinstance(part, dict) else part
            total += len(text) if isinstance(text, str) else 0
    return total


def _placeholders(messages: Any) -> int:
    parts = [
        part for content in _contents(messages) if isinstance(content, list) for part in content
    ]
    return sum(isinstance(part, dict) and part.get("type") == "image" for part in parts)


def open_source(data: DataConfig) -> Source:
    """The samples of a data set."""
    path = Path(data.path)
    if path.suffix in (".json", ".jsonl"):
        return MessagesSource(data)
    import datasets

    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[data.split]
    elif path.is_dir() and any(path.glob("*.json*")):
        return MessagesSource(data)
    else:
        dataset = datasets.load_dataset(data.path, split=data.split)
    return DatasetSource(data, dataset)
