"""Forward and backward of the loss on this machine's CPU, beside the bare matmuls (`floor`).

All implementations of one size run in turn, round by round, so that whatever slows the machine
down slows all of them. pytest-benchmark then gets the measured times one by one.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.implementations import NAMES, SIZES, Size, make_step
from benchmarks.memory import peak_bytes

THREADS = 2
SECONDS = 9.0  # of measurement for a size
ROUNDS = (7, 60)  # at least, at most


@cache
def measure(size: Size) -> dict[str, list[float]]:
    """Seconds of every round of every implementation."""
    torch.set_num_threads(THREADS)
    steps = {name: make_step(name, size) for name in NAMES}
    for step in steps.values():
        for _ in range(2):
            step()
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    start = time.perf_counter()
    for round_ in range(ROUNDS[1]):
        names = NAMES if round_ % 2 else NAMES[::-1]  # nobody always follows the same neighbour
        for name in names:
            begin = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - begin)
        if round_ + 1 >= ROUNDS[0] and time.perf_counter() - start > SECONDS:
            break
    return times


class Replay:
    """A function and a clock for pytest-benchmark that live through measured times again."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times: Iterator[float] = iter(())

    def step(self) -> None:
        self.now += next(self.times)

    def clock(self) -> float:
        return self.now


REPLAY = Replay()


@cache
def machine() -> dict[str, Any]:
    def output(*command: str) -> str:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "commit": output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "changed_files": len(output("git", "status", "--short", "prereg_kernels").splitlines()),
        "device": names[0] if names else platform.processor(),
        "torch": torch.__version__,
        "threads": THREADS,
    }


@pytest.mark.benchmark(timer=REPLAY.clock)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_backward(benchmark: Any, size: Size, name: str) -> None:
    times = measure(size)
    REPLAY.times = iter(times[name])
    benchmark.group = str(size)
    benchmark.pedantic(REPLAY.step, rounds=len(times[name]), iterations=1)
    floor = statistics.median(times["floor"])
    benchmark.extra_info |= machine() | {
        "implementation": name,
        "size": str(size),
        "ratio_to_floor": statistics.median(times[name]) / floor,
    }
    if name != "floor":
        benchmark.extra_info["peak_bytes"] = peak_bytes(name, size)
