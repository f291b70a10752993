# SPDX-License-Identifier: Apache-2.0
"""Interleaved measurements, and limits of time."""

from __future__ import annotations

import time

import pytest

from benchmarks.common.timing import (
    CpuClock,
    Effort,
    Measured,
    OverBudgetError,
    interleave,
    time_limit,
)


def test_interleave_turns_the_order_and_drops_what_fails() -> None:
    order: list[str] = []

    def fail() -> None:
        order.append("bad")
        raise ValueError("no\nsecond line")

    steps = {
        "a": Measured(lambda: order.append("a")),
        "bad": Measured(fail),
        "b": Measured(lambda: order.append("b"), before=lambda: order.append("before b")),
    }
    times, errors = interleave(steps, CpuClock(), Effort(4, 4, 0.0))
    forwards, backwards = ["a", "before b", "b"], ["before b", "b", "a"]
    assert order == ["before b", "b", "bad", "a", *forwards, *backwards, *forwards]
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    assert errors == {"bad": "ValueError: no second line"}


def test_interleave_keeps_to_its_time() -> None:
    steps = {"slow": Measured(lambda: time.sleep(0.02))}
    times, _ = interleave(steps, CpuClock(), Effort(2, 50, 0.0))
    assert len(times["slow"]) == 2
    assert min(times["slow"]) >= 20


def test_time_limit() -> None:
    with pytest.raises(OverBudgetError, match="longer than 2 s"), time_limit(1.5):
        try:
            time.sleep(10)
        except Exception:  # as a compiler's catch-all would
            pytest.fail("swallowed")
    with pytest.raises(OverBudgetError, match="no time left"), time_limit(0.0):
        pytest.fail("entered")
