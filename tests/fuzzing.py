"""Fuzzers: hypothesis tests of few examples in the suite, and of FUZZ times as many by `make fuzz`.

`@fuzz(50)` stands above `@given(...)`, in place of hypothesis' `settings(max_examples=50)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

TIMES = int(os.environ.get("FUZZ", "1"))


def fuzz(examples: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a hypothesis test as a fuzzer, of so many examples in the suite."""

    def mark(test: Callable[..., Any]) -> Callable[..., Any]:
        return pytest.mark.fuzz(settings(max_examples=examples * TIMES)(test))

    return mark
