# SPDX-License-Identifier: Apache-2.0
"""Block sizes and numbers of warps: pure functions of shapes, without triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

REGISTERS = 65536  # of 4 bytes, on a multiprocessor
COLUMN_BLOCK = 2048  # columns at once of a longer row, 8 a thread
MOST_PROGRAMS = 65535  # along the second and the third axis of a grid
MOST_WARPS = 16  # of 64 threads on AMD, where a program has 1024 at most
THREAD = 80  # registers of a thread, at most, in the kernels whose programs run all at once


@dataclass(frozen=True)
class Tile:
    """Blocks of an elementwise kernel: (block_m, block_n) elements a program."""

    block_m: int
    block_n: int
    num_warps: int = 4


@dataclass(frozen=True)
class LossRow:
    """Of the loss: `block_n` columns at once, `programs` that share the rows.

    most_registers: of a thread; the compiler would take 64 and spill, or 101, and fewer programs
    would run at once than there are.
    """

    block_n: int
    num_warps: int
    programs: int
    whole_row: bool  # in registers; else in blocks of columns, which are read several times
    most_registers: int | None = None


# 16 elements a thread: in bfloat16 two loads of 16 bytes. 512 divides the usual widths.
ALONG_ROWS = Tile(4, 512)
# Neither direction of a transposed source is then read or written in pieces below 64 bytes
ACROSS_ROWS = Tile(64, 32)
SUMS = Tile(64, 32)


@cache
def tile(columns: int, column_stride: int = 1) -> Tile:
    """For rows of `columns` elements that lie `column_stride` apart in the source."""
    if column_stride != 1:
        return ACROSS_ROWS
    elements = ALONG_ROWS.block_m * ALONG_ROWS.block_n
    block_n = min(next_power_of_2(columns), ALONG_ROWS.block_n)
    return Tile(elements // block_n, block_n)


def grid(rows: int, columns: int, blocks: Tile) -> tuple[int, int, int]:
    """(column blocks, row blocks, ...): a grid's first numbers run fastest.

    So programs that run together read and write memory that lies together.
    """
    row_blocks = cdiv(rows, blocks.block_m)
    if row_blocks <= MOST_PROGRAMS:
        return cdiv(columns, blocks.block_n), row_blocks, 1
    deep = cdiv(row_blocks, MOST_PROGRAMS)
    return cdiv(columns, blocks.block_n), cdiv(row_blocks, deep), deep


def resident(num_warps: int, multiprocessors: int) -> int:
    """Programs that a GPU runs at once, whose threads have THREAD registers."""
    return max(1, REGISTERS // (THREAD * 32 * num_warps)) * multiprocessors


def programs_along_rows(rows: int, columns: int, blocks: Tile, multiprocessors: int) -> int:
    """How many programs share the rows of a column block, where each sums up its columns.

    As many as run at once: each writes its sums, and a last wave of few would leave a GPU idle.
    """
    column_blocks = cdiv(columns, blocks.block_n)
    at_once = resident(blocks.num_warps, multiprocessors)
    return min(cdiv(rows, blocks.block_m), max(1, at_once // column_blocks))


@lru_cache(maxsize=1024)
def loss_row(rows: int, columns: int, itemsize: int, sums: bool, multiprocessors: int) -> LossRow:
    """The loss of `rows` rows; itemsize: bytes of an element of the statistics' dtype.

    A row stays in registers if z, t and the sums take up to half of them: with more, sm_80 to
    sm_100 spill.
    """
    words = itemsize // 4
    block_n = next_power_of_2(columns)
    live = block_n * words * (3 if sums else 2)
    whole_row = live <= REGISTERS // 2
    # In bfloat16 up to 512 columns take one warp, 16 a thread: no two warps share a column
    num_warps = min(max(1, block_n * words // 512), MOST_WARPS) if whole_row else 8
    # Each writes a row of sums: as many as run at once
    programs = min(rows, resident(num_warps, multiprocessors)) if sums else rows
    if not whole_row:
        return LossRow(COLUMN_BLOCK // words, num_warps, programs, False)
    return LossRow(block_n, num_warps, programs, True, THREAD if sums else None)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)
