# SPDX-License-Identifier: Apache-2.0
"""Clocks for the GPU benchmark, and how its measurements are taken.

All steps of a case run in turn, round by round, every other round backwards, so that whatever
slows the device down slows all of them and nobody always follows the same neighbour. Before each
sample, and outside of it, the device reads a large buffer: this empties the L2 cache, and gives the
host a head start of about a millisecond, as it has in training, where the device is never idle.
What the launches cost without a head start is measured for itself.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

Step = Callable[[], object]
HEAD_START_BYTES = 4 * 2**30  # read at 3 to 4.5 TB/s: 0.9 to 1.4 ms, and many times the L2


@dataclass(frozen=True)
class Measured:
    """A step to time, with what has to be restored before each sample."""

    step: Step
    before: Step | None = None


class CpuClock:
    """Host time, to exercise the benchmark where there is no GPU."""

    device = torch.device("cpu")

    def sample(self, measured: Measured, head_start: bool = True) -> Callable[[], float]:
        """Run the step; the result, called after `wait`, is its milliseconds."""
        if measured.before is not None:
            measured.before()
        start = time.perf_counter()
        measured.step()
        milliseconds = 1e3 * (time.perf_counter() - start)
        return lambda: milliseconds

    def wait(self) -> None:
        """Until the device is done."""


class CudaClock:
    """Device time between two events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        elements = HEAD_START_BYTES // 4
        self.buffer = torch.rand(elements, device=device)

    def sample(self, measured: Measured, head_start: bool = True) -> Callable[[], float]:
        """Run the step; the result, called after `wait`, is its milliseconds."""
        if measured.before is not None:
            measured.before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.sum()
        if not head_start:
            torch.cuda.synchronize(self.device)
        begin.record()
        measured.step()
        end.record()
        return lambda: begin.elapsed_time(end)

    def wait(self) -> None:
        """Until the device is done."""
        torch.cuda.synchronize(self.device)


Clock = CpuClock | CudaClock


def make_clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Effort:
    """How many rounds: at least, at most, and no new one after so many seconds."""

    least: int
    most: int
    seconds: float


def interleave(
    steps: Mapping[str, Measured], clock: Clock, effort: Effort, head_start: bool = True
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of every round of every step, and the errors of those that failed."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    errors: dict[str, str] = {}
    begin = time.perf_counter()
    for round_ in range(effort.most):
        names = [name for name in steps if name not in errors]
        pending: list[tuple[str, Callable[[], float]]] = []
        for name in names if round_ % 2 else names[::-1]:
            try:
                pending.append((name, clock.sample(steps[name], head_start)))
            except Exception as error:
                errors[name] = describe_error(error)
        clock.wait()
        for name, milliseconds in pending:
            times[name].append(milliseconds())
        if round_ + 1 >= effort.least and time.perf_counter() - begin > effort.seconds:
            break
    return {name: values for name, values in times.items() if name not in errors}, errors


def warm_and_interleave(
    steps: Mapping[str, Measured], clock: Clock, effort: Effort, head_start: bool = True
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """As `interleave`, after two rounds that are thrown away: they compile, and load libraries."""
    _, errors = interleave(steps, clock, Effort(2, 2, 0.0))
    sound = {name: step for name, step in steps.items() if name not in errors}
    times, later = interleave(sound, clock, effort, head_start)
    return times, errors | later


def time_one(step: Step, clock: Clock, effort: Effort, head_start: bool = True) -> list[float]:
    """Milliseconds of a step by itself.

    Raises:
        RuntimeError: the step failed.
    """
    times, errors = warm_and_interleave({"step": Measured(step)}, clock, effort, head_start)
    if errors:
        raise RuntimeError(errors["step"])
    return times["step"]


def describe_error(error: BaseException) -> str:
    """Its type and the first lines of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:4])}"[:400]


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory beyond the inputs: the step's peak, and what forward leaves behind."""

    peak: int
    held: int


def measure_memory(forward: Callable[[], Any], backward: Callable[[Any], object]) -> Memory:
    """Of one step that has run before, so that workspaces are not counted."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = forward()
    held = torch.cuda.memory_allocated() - before
    backward(result)
    torch.cuda.synchronize()
    return Memory(torch.cuda.max_memory_allocated() - before, held)


def graph_replay(step: Step) -> Step:
    """The step as a CUDA graph; the result launches it.

    Raises:
        RuntimeError: the step waits for the device, or does something else a graph cannot.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class OverBudgetError(BaseException):
    """Not an Exception, so that no compiler on the way swallows or wraps it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OverBudgetError in the block once the seconds are over."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise OverBudgetError(f"took longer than {seconds:.0f} s")

    if seconds <= 1:
        raise OverBudgetError("no time left")
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
