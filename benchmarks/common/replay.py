# SPDX-License-Identifier: Apache-2.0
"""Gives pytest-benchmark what was measured elsewhere: interleaved samples, or bytes.

A module whose tests do so has `pytestmark = pytest.mark.benchmark(timer=REPLAY.clock)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

BYTES = "bytes"  # in extra_info: a "second" of the statistics is one


class Replay:
    """A function and a clock that live through measured times again."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times: Iterator[float] = iter(())

    def step(self) -> None:
        self.now += next(self.times)

    def clock(self) -> float:
        return self.now

    def seconds(self, benchmark: Any, samples: Sequence[float]) -> None:
        """The statistics of a benchmark are those of these samples."""
        self.now, self.times = 0.0, iter(samples)
        benchmark.pedantic(self.step, rounds=len(samples), iterations=1)

    def milliseconds(self, benchmark: Any, samples: Sequence[float]) -> None:
        self.seconds(benchmark, [sample / 1e3 for sample in samples])

    def bytes(self, benchmark: Any, count: int) -> None:
        """The statistics are in bytes, so that pytest-benchmark compares these."""
        self.seconds(benchmark, [float(count)])
        benchmark.extra_info["unit"] = BYTES


REPLAY = Replay()
