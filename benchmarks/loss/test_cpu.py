"""Forward and backward of the loss on this machine's CPU, beside the bare matmuls (`floor`).

All peers run in turn, round by round, so that whatever slows the machine down slows all of them.
pytest-benchmark then gets the measured times one by one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.common.timing import CpuClock, Effort, Measured, interleave, warm_and_interleave
from benchmarks.loss.cases import Case, make_tensors
from benchmarks.loss.checks import full_truth
from benchmarks.loss.cpu import CPU, FLOOR, NAMES, PEERS, cpu_case, is_emulated, make_step
from benchmarks.loss.cpu_memory import peak_bytes
from benchmarks.loss.work import Work
from prereg_kernels._util.machine import describe_machine

THREADS = 2
EFFORT = Effort(5, 60, 9.0)
ONCE = Effort(1, 1, 0.0)  # for those that run on emulated products
CASES = tuple(
    cpu_case(8192, width, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (512, 1024, 2048)
)
MEMORY_CASE = cpu_case(65536, 512, torch.float32)


def runs(name: str, case: Case) -> bool:
    """Whether to time it. PyTorch's own low-precision products take minutes where emulated."""
    return not is_slow(name, case) or case.widths[0] <= 512


def is_slow(name: str, case: Case) -> bool:
    return is_emulated(case.dtype) and name != FLOOR and not PEERS[name].ours


@cache
def measure(case: Case) -> dict[str, list[float]]:
    """Milliseconds of every round of every peer."""
    torch.set_num_threads(THREADS)
    torch._dynamo.reset()  # the compilers' memory of other cases
    tensors, clock = make_tensors(case, CPU), CpuClock()
    steps = {n: Measured(make_step(n, case, tensors)) for n in NAMES if runs(n, case)}
    slow = {name: steps.pop(name) for name in tuple(steps) if is_slow(name, case)}
    times, errors = warm_and_interleave(steps, clock, EFFORT)
    _, failed = interleave(slow, clock, ONCE)  # warms up
    slow_times, later = interleave(slow, clock, ONCE)
    if errors := errors | failed | later:
        raise RuntimeError(errors)
    return times | slow_times


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
    return describe_machine(CPU, None) | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": THREADS,
    }


def describe(case: Case, name: str) -> dict[str, Any]:
    return machine() | {"implementation": name, "size": case.name}


@pytest.mark.parametrize("name", PEERS)
def test_results(name: str) -> None:
    """A peer computes the loss and its gradients."""
    case = CASES[0]
    tensors = make_tensors(case, CPU)
    truth = full_truth(case, tensors)
    assert truth is not None
    truth.check(Work(PEERS[name], tensors))


@pytest.mark.benchmark(timer=REPLAY.clock)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(benchmark: Any, case: Case, name: str) -> None:
    if not runs(name, case):
        pytest.skip(f"this CPU emulates {case.dtype} products: a step would take minutes")
    times = measure(case)
    REPLAY.times = (milliseconds / 1e3 for milliseconds in times[name])
    benchmark.group = case.name
    benchmark.pedantic(REPLAY.step, rounds=len(times[name]), iterations=1)
    benchmark.extra_info |= describe(case, name) | {
        "ratio_to_floor": statistics.median(times[name]) / statistics.median(times[FLOOR]),
        "emulated": is_emulated(case.dtype),
    }


@pytest.mark.parametrize("name", PEERS)
def test_memory(benchmark: Any, name: str) -> None:
    """The peak of one step beyond the inputs and the gradient of hidden."""
    case = MEMORY_CASE
    gradient = case.tokens * case.widths[0] * case.dtype.itemsize
    peak = peak_bytes(name, case)
    benchmark.pedantic(lambda: None)  # nothing is timed here
    benchmark.group = f"memory, {case.name}"
    benchmark.extra_info |= describe(case, name) | {"peak_bytes": peak - gradient}
