# SPDX-License-Identifier: Apache-2.0
"""LLaVA's format: {"conversations": [{"from": "human", "value": "..."}, ...], "image": "a.jpg"}.

"<image>" in a human's turn is the place of an image. "image" is a path, a list of them, or absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.hub import Columns, DatasetSource, dataset_files, images_of, is_json
from prereg_kernels.train.sample import BadSampleError, Sample, check_messages
from prereg_kernels.train.source import JsonSource, json_files

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PLACEHOLDER = "<image>"


class LlavaSource(JsonSource):
    """As LLaVA's instruction data is written."""

    def shape(self, record: dict[str, Any]) -> tuple[int, int]:
        """(characters of text, images)."""
        return _shape(record.get("conversations"))[0], len(images_of(record))

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """The sample of a record."""
        messages, images = messages_of(record), images_of(record)
        if any(not isinstance(image, str) for image in images):
            raise BadSampleError("image: expected a path or a list of paths")
        return Sample(where, check_messages(messages, len(images)), images, self.root)


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of its conversation. Raises BadSampleError where it is none."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSampleError("conversations: expected a list of turns")
    return [_message(turn, number) for number, turn in enumerate(turns)]


def _message(turn: Any, number: int) -> dict[str, Any]:
    role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise BadSampleError(
            f'conversations[{number}]: expected "from", one of {", ".join(ROLES)}, and "value"'
        )
    if role == "assistant":  # an answer may name the placeholder, and holds no image
        return {"role": role, "content": [{"type": "text", "text": turn["value"]}]}
    return {"role": role, "content": parts(turn["value"])}


def parts(text: str) -> list[dict[str, str]]:
    """The content of a message, of which each placeholder is an image.

    As LLaVA does, the line break beside a placeholder goes with it: the chat template puts the
    image where the model expects it.
    """
    found: list[dict[str, str]] = []
    for piece in re.split(rf"(\n?{re.escape(PLACEHOLDER)}\n?)", text):
        if PLACEHOLDER in piece:
            found.append({"type": "image"})
        elif piece:
            found.append({"type": "text", "text": piece})
    return found


def _shape(turns: Any) -> tuple[int, int]:
    if not isinstance(turns, list):
        return 0, 0
    spoken = [(x.get("from"), x["value"]) for x in turns if isinstance(x, dict) and "value" in x]
    texts = [(who, text) for who, text in spoken if isinstance(text, str)]
    asked = [text for who, text in texts if who == "human"]
    return sum(len(text) for _, text in texts), sum(text.count(PLACEHOLDER) for text in asked)


COLUMNS = Columns("conversations", messages_of, _shape)


def open_source(data: DataConfig) -> Any:
    """The samples of JSON files, or of a data set with columns as their records have."""
    return DatasetSource(data, COLUMNS) if _is_data_set(data) else LlavaSource(data)


def files_of(data: DataConfig) -> list[Path]:
    """The files that it reads."""
    return dataset_files(data) if _is_data_set(data) else json_files(Path(data.path))


def _is_data_set(data: DataConfig) -> bool:
    path = Path(data.path)
    is_here = path.exists() and path.suffix != ".parquet"
    has_rows = not is_here or any(path.rglob("*.parquet")) or any(path.glob("dataset_*.json"))
    return has_rows and not is_json(path)
