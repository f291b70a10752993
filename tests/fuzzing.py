# SPDX-License-Identifier: Apache-2.0
"""Fuzzers: hypothesis tests of few examples in the suite, and of FUZZ times as many by `make fuzz`.

`@fuzz(50)` stands above `@given(...)`, in place of hypothesis' `settings(max_examples=50)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("FUZZ", "1"))


def fuzz(examples: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a hypothesis test as a fuzzer, of so many examples in the suite."""

    def mark(test: Callable[..., Any]) -> Callable[..., Any]:
        return pytest.mark.fuzz(settings(max_examples=examples * TIMES)(test))

    return mark


def damaged(draw: Callable[[st.SearchStrategy[Any]], Any], content: bytes) -> bytes:
    """The content of a file, cut short or with up to three of its bytes changed."""
    if not content or draw(st.booleans()):
        return content[: draw(st.integers(0, max(len(content) - 1, 0)))]
    flipped = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        flipped[place] ^= draw(st.integers(1, 255))
    return bytes(flipped)
