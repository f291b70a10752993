# SPDX-License-Identifier: Apache-2.0
"""What the Triton backend decides without Triton: block sizes, and whether it runs at all."""

from __future__ import annotations

import sys

import pytest

from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.backend import unavailable

H100 = 132  # multiprocessors


@pytest.mark.parametrize("columns", (1, 7, 512, 513, 3584, 4096, 8192, 16384, 20480, 10**6))
@pytest.mark.parametrize("itemsize", (4, 8))
@pytest.mark.parametrize("sums", (False, True))
@pytest.mark.parametrize("rows", (1, 5, 576, 6144, 10**6))
@pytest.mark.parametrize("gpu", (4, 132))
def test_loss_row(rows: int, columns: int, itemsize: int, sums: bool, gpu: int) -> None:
    chosen = config.loss_row(rows, columns, itemsize, sums, gpu)
    assert chosen.block_n == config.next_power_of_2(chosen.block_n)
    assert 1 <= chosen.programs <= rows
    assert chosen.num_warps in (1, 2, 4, 8, 16)
    if chosen.whole_row:
        assert columns <= chosen.block_n < 2 * columns
        assert (3 if sums else 2) * chosen.block_n * itemsize <= 4 * config.REGISTERS / 2
    if chosen.num_warps > 1:  # a column in two warps would be a race
        assert chosen.block_n >= chosen.num_warps * 64
    if sums:  # all of them run at once, and fill the GPU, where there are rows
        threads = 32 * chosen.num_warps
        at_once = max(1, config.REGISTERS // (threads * config.THREAD)) * gpu
        assert chosen.programs == min(rows, at_once)
    else:
        assert chosen.programs == rows


def test_the_paper_s_sizes_stay_in_registers() -> None:
    row = config.LossRow(4096, 8, 396, True, 80)
    assert config.loss_row(6144, 4096, 4, True, H100) == row
    assert config.loss_row(18432, 3584, 4, True, H100) == row
    assert config.loss_row(6144, 16384, 4, False, H100) == config.LossRow(16384, 16, 6144, True)
    assert not config.loss_row(6144, 20480, 4, False, H100).whole_row


@pytest.mark.parametrize("columns", (1, 33, 512, 4096))
@pytest.mark.parametrize("column_stride", (1, 0, 5))
def test_tile(columns: int, column_stride: int) -> None:
    chosen = config.tile(columns, column_stride)
    assert chosen.block_m * chosen.block_n == 2048
    assert chosen.block_n <= (512 if column_stride == 1 else 32)


@pytest.mark.parametrize("rows", (1, 4, 5, 262_140, 262_141, 10**7))
def test_grid(rows: int) -> None:
    blocks = config.tile(4096)
    columns, wide, deep = config.grid(rows, 4096, blocks)
    row_blocks = config.cdiv(rows, blocks.block_m)
    assert columns == 8
    assert wide <= 65535
    assert row_blocks <= wide * deep < row_blocks + deep
    assert deep == (1 if rows <= 262_140 else config.cdiv(row_blocks, 65535))


@pytest.mark.parametrize("columns", (33, 4096))
@pytest.mark.parametrize("rows", (1, 130, 6144, 10**6))
def test_programs_along_rows(rows: int, columns: int) -> None:
    blocks = config.tile(columns)
    programs = config.programs_along_rows(rows, columns, blocks, H100)
    column_blocks = config.cdiv(columns, blocks.block_n)
    at_once = 6 * H100  # of 4 warps
    assert programs == min(config.cdiv(rows, blocks.block_m), at_once // column_blocks)


def test_a_cpu_without_interpreter_does_not_import_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it would fail
    assert "TRITON_INTERPRET=1" in str(unavailable("cpu"))
    assert unavailable("mps") == "Triton kernels are for NVIDIA and AMD GPUs"
    assert str(unavailable("cuda")).startswith("Triton cannot be imported: ")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert str(unavailable("cpu")).startswith("Triton cannot be imported: ")
