"""LLaVA's format: {"conversations": [{"from": "human", "value": "..."}, ...], "image": "a.jpg"}.

"<image>" in a human's turn is the place of an image. "image" is a path, a list of them, or absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sample import BadSampleError, Sample, check_messages
from prereg_kernels.train.source import JsonSource

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PLACEHOLDER = "<image>"


class LlavaSource(JsonSource):
    """As LLaVA's instruction data is written."""

    def shape(self, record: dict[str, Any]) -> tuple[int, int]:
        """(characters of text, images)."""
        turns = record.get("conversations")
        values = [x.get("value") for x in turns if isinstance(x, dict)] if turns else []
        return sum(len(x) for x in values if isinstance(x, str)), len(_images(record))

    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """The sample of a record."""
        messages, images = messages_of(record), _images(record)
        if any(not isinstance(image, str) for image in images):
            raise BadSampleError("image: expected a path or a list of paths")
        return Sample(where, check_messages(messages, len(images)), images, self.root)


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of its conversation. Raises BadSampleError where it is none."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSampleError("conversations: expected a list of turns")
    return [_message(turn, number) for number, turn in enumerate(turns)]


def _images(record: dict[str, Any]) -> list[Any]:
    image = record.get("image")
    if image is None or image == "":
        return []
    return image if isinstance(image, list) else [image]


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


def open_source(data: DataConfig) -> LlavaSource:
    """The samples of a data set."""
    return LlavaSource(data)
