# SPDX-License-Identifier: Apache-2.0
"""A sample of training data, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

Message = Mapping[str, Any]
"""{"role": ..., "content": [{"type": "text", "text": ...} or {"type": "image"}, ...]}"""

ROLES = ("system", "user", "assistant")


class BadSampleError(Exception):
    """A sample that cannot be used. The message is the reason; the run goes on without it."""


@dataclass(frozen=True)
class Sample:
    """A conversation, and the images of its placeholders, in their order.

    Attributes:
        where: the file and line, or the data set and row, for messages.
        images: paths below `root`, the bytes of image files, or images.
        root: the folder that no path may lead out of.
    """

    where: str
    messages: Sequence[Message]
    images: Sequence[str | bytes | Image.Image] = ()
    root: Path | None = None


@dataclass(frozen=True)
class Shape:
    """What is known of a sample before it is read: batches are grouped by it.

    Attributes:
        length: of its text, in characters.
        images: how many.
    """

    length: int
    images: int


def check_messages(messages: Any, images: int) -> Sequence[Message]:
    """The messages, each content a list of parts; a text of its own becomes one part.

    Raises:
        BadSampleError: they are none, no message is an answer, or their placeholders are not as
            many as the images.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise BadSampleError("messages: expected a list of messages")
    checked = [_message(message, number) for number, message in enumerate(messages)]
    if all(message["role"] != "assistant" for message in checked):
        raise BadSampleError("messages: expected an answer, got no message of the assistant")
    placeholders = sum(part["type"] == "image" for m in checked for part in m["content"])
    if placeholders != images:
        raise BadSampleError(
            f"expected an image for each of {placeholders} placeholders, got {images} images"
        )
    return checked


def _message(message: Any, number: int) -> Message:
    at = f"messages[{number}]"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise BadSampleError(f"{at}: expected a role of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": [{"type": "text", "text": content}]}
    if not isinstance(content, Sequence):
        raise BadSampleError(f"{at}.content: expected text or a list of parts")
    return {"role": message["role"], "content": [_part(part, at) for part in content]}


def _part(part: Any, at: str) -> Mapping[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        return {"type": "image"}
    raise BadSampleError(f"{at}.content: expected parts of type text or image")
