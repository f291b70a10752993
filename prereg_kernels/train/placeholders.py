# SPDX-License-Identifier: Apache-2.0
"""Texts that a model would read as an image: its placeholder, as a text about HTML has it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from prereg_kernels.train.sample import BadSampleError, Message


def placeholders(processor: Any, ids: Iterable[int]) -> frozenset[str]:
    """What stands for an image or a video in a text: for the processor, or by these ids."""
    names = ("image_token", "video_token")
    own = [str(getattr(processor, name, None) or "") for name in names]
    tokens = processor.tokenizer.convert_ids_to_tokens(sorted(ids))
    return frozenset(token for token in (*own, *tokens) if token)


def check_texts(messages: Iterable[Message], found: Collection[str]) -> None:
    """Raise BadSampleError where a text holds such a placeholder: there is no image for it.

    The messages themselves have one for each image, as parts of their own.
    """
    for number, message in enumerate(messages):
        for part in message["content"]:
            for placeholder in found:
                if part["type"] == "text" and placeholder in part["text"]:
                    raise BadSampleError(
                        f"messages[{number}]: its text has {placeholder!r}, which stands for an "
                        "image in this model; expected no text with it"
                    )
