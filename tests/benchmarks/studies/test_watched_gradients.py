# SPDX-License-Identifier: Apache-2.0
"""The study of watched gradients: its sums."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.studies.watched_gradients import StepTimes, summary


def test_summary() -> None:
    """Of pairs, whichever of the two comes first."""
    found = summary([(True, 1.3), (False, 1.0), (True, 2.5), (False, 2.0), (True, 4.4)])
    assert found["pairs"] == 2
    assert found["step_seconds"] == 1.5
    assert found["added_seconds"] == pytest.approx(0.4)
    assert found["of_a_watched_step"] == pytest.approx(0.4 / 1.5)
    assert found["of_the_run"] == pytest.approx(0.4 / 1.5 / 50)
    assert summary([(False, 1.0), (True, 1.3)])["added_seconds"] == pytest.approx(0.3)


def test_the_interval_of_the_median() -> None:
    """Of 100 pairs the 40th and the 61st, as a table of the binomial distribution has it."""
    steps = [(bool(n % 2), 1.0 + (n // 2 if n % 2 else 0)) for n in range(200)]
    low, high = summary(steps[::-1])["added_interval"]
    assert (low, high) == (39.0, 60.0)


def test_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watched ones are the first, and every second."""
    clock = iter([1.0, 2.0, 4.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    times = StepTimes()
    for step in range(4):
        times.on_step_begin(None, SimpleNamespace(global_step=step))
    assert times.steps == [(True, 1.0), (True, 2.0), (False, 3.0)]
