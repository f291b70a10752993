# SPDX-License-Identifier: Apache-2.0
"""What a call costs beside its arithmetic: forward and backward of few rows, of few features.

One thread; on a GPU from an idle device, until it is idle again. Two revisions are compared by
`make bench-compare BASE=REV`, as differences here are smaller than those between two processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.loss.cases import make_tensors
from benchmarks.loss.checks import full_truth
from benchmarks.loss.cpu import CPU, cpu_case
from benchmarks.loss.peers import PEERS
from benchmarks.loss.plans import threads
from benchmarks.loss.suite import describe
from benchmarks.loss.work import Work
from prereg_kernels.ops.backends import registry

ROWS = (1, 4, 16, 64, 256, 1024)
WIDTH = 64
ON_CPU = (("eager", None), *((n, b) for n in ("fused", "tap") for b in ("torch", "cpp")))
ON_GPU = (("eager", None), ("fused", "triton"), ("tap", "triton"))
pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=20)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def time_call(
    benchmark: Any, device: torch.device, rows: int, name: str, backend: str | None
) -> None:
    [peer] = [peer for peer in PEERS if peer.name == name]
    case, label = cpu_case(rows, WIDTH, torch.float32), ", ".join(filter(None, (name, backend)))
    tensors = make_tensors(case, device)
    work, truth = Work(replace(peer, backend=backend), tensors), full_truth(case, tensors)
    assert truth is not None
    truth.check(work)

    def call() -> None:
        work.step()
        if device != CPU:
            torch.cuda.synchronize()

    benchmark.group = f"call, {rows} rows of {WIDTH}, {device.type}"
    benchmark.extra_info |= describe(device, case, label)
    benchmark(call)


@pytest.mark.parametrize(("name", "backend"), ON_CPU)
@pytest.mark.parametrize("rows", ROWS)
def test_call(benchmark: Any, rows: int, name: str, backend: str | None) -> None:
    if backend and (reason := registry.unavailable(backend, "cpu")):
        pytest.skip(reason)
    time_call(benchmark, CPU, rows, name, backend)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), ON_GPU)
@pytest.mark.parametrize("rows", ROWS)
def test_gpu_call(
    benchmark: Any, device: torch.device, rows: int, name: str, backend: str | None
) -> None:
    backend = "torch" if device == CPU and backend else backend
    time_call(benchmark, device, rows, name, backend)
