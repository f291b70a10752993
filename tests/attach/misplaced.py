# SPDX-License-Identifier: Apache-2.0
"""A family with one id too many, which the model shows as a word: the first steps must say so."""

from __future__ import annotations

from typing import Any

from prereg_kernels.attach.family import Family
from tests.tiny import IMAGE_TOKEN, make_batch

WORD = 5
FAMILY = Family(
    "LLaVA",
    language_model="model.language_model",
    layers="model.language_model.layers",
    visual_tokens=(IMAGE_TOKEN, WORD),
)
ERROR = r"visual_tokens: of the \d+ visual positions of the batch .* 2 enter"


def right_batch(**arguments: Any) -> dict[str, Any]:
    """One without that word: each visual position has features."""
    batch = make_batch(**arguments)
    batch["input_ids"][batch["input_ids"] == WORD] = WORD + 1
    return batch


def wrong_batch(**arguments: Any) -> dict[str, Any]:
    """One with it, at the end of both rows."""
    batch = right_batch(**arguments)
    batch["input_ids"][:, -1] = WORD
    return batch
