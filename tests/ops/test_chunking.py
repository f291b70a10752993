# SPDX-License-Identifier: Apache-2.0
"""Chunk sizes and matmul dtypes: pure functions of shapes, dtypes and devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prereg_kernels.ops import chunking, dtypes
from prereg_kernels.ops.chunking import (
    CPU,
    NARROW,
    TILES,
    ChunkBudget,
    choose_chunk_rows,
    chunk_budget,
    gpu_budget,
    scratch_columns,
)
from prereg_kernels.ops.dtypes import operand_dtype

GIB = 2**30
H100, H200 = gpu_budget(79 * GIB), gpu_budget(140 * GIB)
SMALL_GPU = gpu_budget(8 * GIB)
WIDTHS = st.integers(1, 2**15)
BUDGETS = st.sampled_from((CPU, NARROW, TILES, H100, H200, SMALL_GPU))


@given(st.integers(0, 2**33), WIDTHS, st.lists(st.tuples(WIDTHS, WIDTHS), max_size=3), BUDGETS)
def test_chunks_cover_all_rows_within_bounds(
    count: int, columns: int, shapes: list[tuple[int, int]], budget: ChunkBudget
) -> None:
    for itemsize in (2, 4, 8):
        rows = choose_chunk_rows(count, columns, shapes, itemsize, budget)
        assert rows == max(count, 1) or rows % budget.multiple == 0, "a ragged edge in every chunk"
        chunks = -(-count // rows)
        assert chunks * rows - count < max(chunks, 1) * budget.multiple, "chunks differ in size"
        scratch = rows * itemsize * scratch_columns(columns, shapes)
        slack = budget.multiple * itemsize * scratch_columns(columns, shapes)
        assert rows <= budget.least_rows or scratch <= budget.scratch_bytes + slack
        least = budget.least_rows / 2
        assert rows == max(count, 1) or rows > least, "chunks too small for their dW traffic"


@given(st.integers(1, 2**20), WIDTHS, BUDGETS)
def test_scratch_does_not_grow_with_the_rows(count: int, columns: int, budget: ChunkBudget) -> None:
    shapes = [(columns, columns)] * 2
    most = max(budget.least_rows, budget.scratch_bytes // (4 * columns * 2)) + budget.multiple
    for rows in (count, 16 * count):
        assert choose_chunk_rows(rows, columns, shapes, 2, budget) <= most


def test_scratch_columns() -> None:
    assert scratch_columns(7, []) == 14  # h and dz
    assert scratch_columns(7, [(5, 7)]) == 12  # h and z
    assert scratch_columns(7, [(3, 7), (5, 3)]) == 18  # h, u, g and z
    assert scratch_columns(7, [(3, 7), (4, 3), (5, 4)]) == 26


@pytest.mark.parametrize(
    ("count", "width", "itemsize", "budget", "chunks"),
    (
        (18432, 4096, 2, H100, 1),  # LLaVA's 32 images of 576 tokens
        (18432, 4096, 4, H100, 2),
        (18432, 4096, 4, H200, 2),
        (18432, 4096, 2, SMALL_GPU, 3),
        (18432, 4096, 2, gpu_budget(39 * GIB), 1),
        (9216, 4096, 2, gpu_budget(24 * GIB), 1),
        (262144, 4096, 2, H100, 11),
        (262144, 4096, 2, H200, 8),
        (2048, 512, 4, CPU, 1),
        (65536, 512, 4, CPU, 16),
        (8192, 2048, 4, CPU, 8),
        (8192, 2048, 2, NARROW, 1),
        (8192, 512, 2, TILES, 2),
        (8192, 1024, 2, TILES, 4),
        (8192, 2048, 2, TILES, 4),
    ),
)
def test_known_shapes(
    count: int, width: int, itemsize: int, budget: ChunkBudget, chunks: int
) -> None:
    rows = choose_chunk_rows(count, width, [(width, width)] * 2, itemsize, budget)
    assert -(-count // rows) == chunks


@pytest.mark.parametrize(
    ("memory", "mib"), ((8 * GIB, 256), (24 * GIB, 640), (79 * GIB, 808.96), (140 * GIB, 1024))
)
def test_scratch_of_a_gpu(memory: int, mib: float) -> None:
    assert gpu_budget(memory).scratch_bytes == pytest.approx(mib * 2**20, abs=1)


def test_budget_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    asked = []

    def properties(device: torch.device) -> Any:
        asked.append(device)
        return SimpleNamespace(total_memory=79 * GIB)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    chunking._total_memory.cache_clear()
    for device, dtype, wide, budget in (
        (cpu, torch.float32, False, CPU),
        (cpu, torch.float32, True, CPU),
        (cpu, torch.bfloat16, False, NARROW),
        (cpu, torch.bfloat16, True, TILES),
        (gpu, torch.bfloat16, True, H100),
        (gpu, torch.bfloat16, False, NARROW),
        (gpu, torch.float32, False, H100),
    ):
        assert chunk_budget(device, dtype, wide) == budget
    assert asked == [gpu], "once, whatever is free"
    chunking._total_memory.cache_clear()


@pytest.mark.parametrize("native", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_operand_dtype(native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_native_on_cpu", lambda _: native)
    assert operand_dtype(dtype, torch.device("cuda")) == dtype
    emulated = dtype.itemsize == 2 and not native
    assert operand_dtype(dtype, torch.device("cpu")) == (torch.float32 if emulated else dtype)
