# SPDX-License-Identifier: Apache-2.0
"""What a program does with failures, and at its end."""

from __future__ import annotations

import time

import pytest

from benchmarks.common.program import Session
from benchmarks.common.timing import CpuClock


def test_a_failing_case_is_recorded() -> None:
    session = Session(CpuClock(), time.monotonic() - 1)
    session.attempt("late", lambda: pytest.fail("entered"))
    assert session.problems == ["late: skipped, no time left"]
    assert not session.ours_failed
