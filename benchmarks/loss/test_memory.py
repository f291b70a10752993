# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a step beyond its inputs and the gradient of hidden, as bytes that compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.common.replay import REPLAY
from benchmarks.common.timing import measure_memory
from benchmarks.loss.cases import Case, make_tensors
from benchmarks.loss.cpu import CPU
from benchmarks.loss.cpu_memory import peak_bytes
from benchmarks.loss.peers import Peer
from benchmarks.loss.plans import CPU_MEMORY, LLAVA, Plan
from benchmarks.loss.suite import cells, describe
from benchmarks.loss.work import Work

pytestmark = pytest.mark.benchmark(timer=REPLAY.clock)


def report(benchmark: Any, device: torch.device, case: Case, peer: Peer, peak: int) -> None:
    gradient = case.positions * case.widths[0] * case.dtype.itemsize if peer.grad else 0
    benchmark.group = f"memory, {case.name}"
    benchmark.extra_info |= describe(device, case, peer.name) | {"peak_bytes": peak - gradient}
    REPLAY.bytes(benchmark, peak - gradient)


@pytest.mark.parametrize(("plan", "name"), cells([CPU_MEMORY], floor=False))
def test_memory(benchmark: Any, is_tiny: bool, sized: Any, plan: Plan, name: str) -> None:
    """In a process of its own, whose peak is the step's."""
    case, peer = sized(plan.case), plan.peers(is_tiny)[name]
    report(benchmark, CPU, case, peer, peak_bytes(peer, case))


@pytest.mark.parametrize(("plan", "name"), cells([LLAVA], floor=False))
def test_gpu_memory(benchmark: Any, device: torch.device, plan: Plan, name: str) -> None:
    """As the allocator knows it; with what forward leaves for backward."""
    if device == CPU:
        pytest.skip("a GPU's allocator alone knows the memory of a step")
    peer = plan.peers()[name]
    work = Work(peer, make_tensors(plan.case, device))
    for _ in range(2):  # workspaces, and what compiles
        work.step()
    memory = measure_memory(work.forward, work.backward)
    report(benchmark, device, plan.case, peer, memory.peak)
    benchmark.extra_info["held_bytes"] = memory.held
