# SPDX-License-Identifier: Apache-2.0
"""TRL's conversational vision format: {"messages": [...], "images": [...]}.

A content is text, or a list of parts as {"type": "text", "text": ...} and {"type": "image"}. Local
JSON files hold paths of images; data sets, on the disk or on the hub, hold images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.hub import Columns, DatasetSource, dataset_files, images_of, is_json
from prereg_kernels.train.sample import BadSampleError, Sample, check_messages
from prereg_kernels.train.source import JsonSource, json_files


class MessagesSource(JsonSource):
    """Of local JSON files."""

    def shape(self, record: dict[str, Any]) -> tuple[int, int]:
        """(characters of text, images)."""
        return _characters(record.get("messages")), len(images_of(record))

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """The sample of a record."""
        images = images_of(record)
        if any(not isinstance(image, str) for image in images):
            raise BadSampleError("images: expected a list of paths")
        messages = check_messages(record.get("messages"), len(images))
        return Sample(where, messages, images, self.root)


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


def _shape(messages: Any) -> tuple[int, int]:
    return _characters(messages), _placeholders(messages)


COLUMNS = Columns("messages", lambda row: row["messages"], _shape)


def open_source(data: DataConfig) -> Any:
    """The samples of a data set."""
    return MessagesSource(data) if is_json(Path(data.path)) else DatasetSource(data, COLUMNS)


def files_of(data: DataConfig) -> list[Path]:
    """The files that it reads."""
    path = Path(data.path)
    return json_files(path) if is_json(path) else dataset_files(data)
