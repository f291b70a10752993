"""Forward and backward of the loss on this machine's CPU, beside the bare matmuls (`floor`).

All implementations of one size run in turn, round by round, so that whatever slows the machine
down slows all of them. pytest-benchmark then gets the measured times one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.implementations import NAMES, Size, is_emulated, make_step
from benchmarks.memory import peak_bytes
from prereg_kernels._util.machine import describe_machine

THREADS = 2
SECONDS = 9.0  # of measurement for a size
ROUNDS = (5, 60)  # at least, at most
SLOW_ROUNDS = 1  # of those that run on emulated products
SIZES = tuple(
    Size(8192, width, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (512, 1024, 2048)
)
MEMORY_SIZE = Size(65536, 512, torch.float32)


def runs(name: str, size: Size) -> bool:
    """Whether to time it. PyTorch's own low-precision products take minutes where emulated."""
    return not is_slow(name, size) or size.width <= 512


def is_slow(name: str, size: Size) -> bool:
    return is_emulated(size.dtype) and name in ("eager", "compiled eager", "Liger's scheme")


@cache
def measure(size: Size) -> dict[str, list[float]]:
    """Seconds of every round of every implementation."""
    torch.set_num_threads(THREADS)
    names = [name for name in NAMES if runs(name, size)]
    steps = {name: make_step(name, size) for name in names}
    for name, step in steps.items():
        for _ in range(1 if is_slow(name, size) else 2):
            step()
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for round_ in range(ROUNDS[1]):
        for name in names if round_ % 2 else names[::-1]:  # nobody always has the same neighbour
            if round_ >= SLOW_ROUNDS and is_slow(name, size):
                continue
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
    return describe_machine(torch.device("cpu"), None) | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": THREADS,
    }


def describe(size: Size, name: str) -> dict[str, Any]:
    return machine() | {"implementation": name, "size": str(size)}


@pytest.mark.benchmark(timer=REPLAY.clock)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_backward(benchmark: Any, size: Size, name: str) -> None:
    if not runs(name, size):
        pytest.skip(f"this CPU emulates {size.dtype} products: a step would take minutes")
    times = measure(size)
    REPLAY.times = iter(times[name])
    benchmark.group = str(size)
    benchmark.pedantic(REPLAY.step, rounds=len(times[name]), iterations=1)
    floor = statistics.median(times["floor"])
    benchmark.extra_info |= describe(size, name) | {
        "ratio_to_floor": statistics.median(times[name]) / floor,
        "emulated": is_emulated(size.dtype),
    }


@pytest.mark.parametrize("name", NAMES[1:])
def test_memory(benchmark: Any, name: str) -> None:
    """The peak of one step beyond the inputs and the gradient of hidden."""
    size = MEMORY_SIZE
    gradient = size.tokens * size.width * size.dtype.itemsize
    peak = peak_bytes(name, size)
    benchmark.pedantic(lambda: None)  # nothing is timed here
    benchmark.group = f"memory, {size}"
    benchmark.extra_info |= describe(size, name) | {"peak_bytes": peak - gradient}
