# SPDX-License-Identifier: Apache-2.0
"""The row primitives one by one, against a copy of as many bytes; on a GPU the fused stages, too.

extra_info has each primitive's bytes, its GB/s, and what percentage that is of the copy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils.benchmark import Timer

from benchmarks.common.machine import machine
from benchmarks.common.program import Session
from benchmarks.common.replay import REPLAY
from benchmarks.common.report import Json
from benchmarks.common.timing import make_clock
from benchmarks.loss import cases
from benchmarks.loss.cpu import CPU
from benchmarks.loss.cpu_primitives import DTYPES, SIZES, Case
from benchmarks.loss.cpu_primitives import cases as primitives
from benchmarks.loss.kernels import Buffers, time_row_kernels
from benchmarks.loss.measure import measure_ceilings
from benchmarks.loss.plans import SIDE, TINY, threads
from benchmarks.loss.stages import Stage, time_stages, triton_kinds
from prereg_kernels.ops.backends import registry
from prereg_kernels.ops.backends.base import Backend
from prereg_kernels.ops.backends.torch import TorchBackend

PRIMITIVES = [case.name for case in primitives(TorchBackend(), 1, 1, torch.float32)]
ROW_KERNELS = (
    "gather_rows", "activate", "activation_backward", "token_losses", "token_losses_and_grad",
    "start_rows", "scatter_rows", "scatter_rows, residual",
)  # fmt: skip
STAGE_CASES = (cases.LLAVA, cases.QWEN, cases.SMALL_HEAD)
STAGES = ("activate", "losses", "backward_activation", "backward_scatter")
COPY_SECONDS = 0.15


@cache
def copy_gb_s(moved: int) -> float:
    """Of a copy that reads and writes this many bytes in all, on one thread."""
    tensors = {"source": torch.ones(moved // 8), "out": torch.empty(moved // 8)}
    timer = Timer("out.copy_(source)", globals=tensors, num_threads=1)
    return moved / float(timer.blocked_autorange(min_run_time=COPY_SECONDS).median) / 1e9


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module", params=("cache", "memory"))
def chunk(
    request: pytest.FixtureRequest, is_tiny: bool, dtype: torch.dtype
) -> Iterator[tuple[tuple[int, int], dict[str, Case]]]:
    """(rows, columns), and every primitive on tensors of this size."""
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    size = SIZES["tiny" if is_tiny else request.param]
    backend = registry.choose_backend("cpp", CPU)
    with threads(1):
        yield size, {case.name: case for case in primitives(backend, *size, dtype)}


@pytest.mark.benchmark(max_time=0.15)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(
    benchmark: Any,
    chunk: tuple[tuple[int, int], dict[str, Case]],
    dtype: torch.dtype,
    name: str,
) -> None:
    size, found = chunk
    moved = found[name].bytes(*size, dtype)
    benchmark.group = f"primitives, {size[0]} x {size[1]} {str(dtype).removeprefix('torch.')}"
    benchmark(found[name].run)
    rate = moved / benchmark.stats.stats.median / 1e9
    benchmark.extra_info |= machine(CPU) | {"bytes": moved, "gb_s": rate}
    benchmark.extra_info["percent_of_copy"] = 100 * rate / copy_gb_s(moved)


@pytest.fixture(scope="module")
def session(device: torch.device) -> Session:
    return Session(make_clock(device), math.inf)


@pytest.fixture(scope="module")
def row_kernels(session: Session, is_tiny: bool, sized: Any) -> Callable[[str], dict[str, Json]]:
    """Of a backend: the records of its kernels, interleaved."""
    effort = TINY if is_tiny else SIDE
    buffers = Buffers(sized(cases.LLAVA), session.device)

    @cache
    def measure(backend: str) -> dict[str, Json]:
        copy = measure_ceilings(session, effort, is_tiny)["copy_gb_s"]
        rows = registry.choose_backend(backend, session.device)
        records = time_row_kernels(rows, buffers, session.clock, effort, copy)
        return {record["name"]: record for record in records}

    return measure


@pytest.mark.gpu
@pytest.mark.benchmark(timer=REPLAY.clock)
@pytest.mark.parametrize("name", ROW_KERNELS)
@pytest.mark.parametrize("backend", ("triton", "torch"))
def test_gpu_row_kernel(
    benchmark: Any, row_kernels: Any, device: torch.device, backend: str, name: str
) -> None:
    record = row_kernels("torch" if device == CPU else backend)[name]
    assert "error" not in record, record["error"]
    benchmark.group = f"row kernels, {record['rows']} x {record['widths'][0]}"
    keys = ("bytes", "formula", "gb_s", "percent_of_copy")
    benchmark.extra_info |= machine(device) | {key: record[key] for key in keys}
    REPLAY.milliseconds(benchmark, record["samples_ms"])


def torch_kinds(stage: Stage, buffers: Buffers) -> tuple[dict[str, Backend], str | None]:
    """Nothing is fused on a CPU."""
    return {"apart": TorchBackend()}, None


@pytest.fixture(scope="module")
def stages(session: Session, is_tiny: bool, sized: Any) -> Callable[[cases.Case], dict[str, Json]]:
    """Of a case: the records of its stages."""
    kinds, effort = (torch_kinds, TINY) if is_tiny else (triton_kinds, SIDE)

    @cache
    def measure(case: cases.Case) -> dict[str, Json]:
        buffers = Buffers(sized(case), session.device)
        return {r["name"]: r for r in time_stages(buffers, kinds, session.clock, effort)}

    return measure


@pytest.mark.gpu
@pytest.mark.benchmark(timer=REPLAY.clock)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", STAGE_CASES, ids=lambda case: case.name)
def test_gpu_stage(
    benchmark: Any, stages: Any, device: torch.device, case: cases.Case, stage: str
) -> None:
    """The stage apart; extra_info has it fused, in each configuration."""
    record = stages(case)[stage]
    assert not record["errors"], record["errors"]
    benchmark.group = f"stage {stage}, {record['rows']} rows, {case.name}"
    keys = ("chosen", "fused_ms", "speedups")
    benchmark.extra_info |= machine(device) | {key: record[key] for key in keys}
    REPLAY.milliseconds(benchmark, record["samples_ms"]["apart"])
