"""Block sizes and numbers of warps: pure functions of shapes, without triton."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65536  # of 4 bytes, on a multiprocessor
COLUMN_BLOCK = 2048  # columns at once of a longer row, 8 a thread
MOST_WARPS = 16  # of 64 threads on AMD, where a program has 1024 at most
FILL = 1024  # programs of 4 warps that any of today's GPUs can run at once, or nearly


@dataclass(frozen=True)
class Tile:
    """Blocks of an elementwise kernel: (block_m, block_n) elements a program."""

    block_m: int
    block_n: int
    num_warps: int = 4


@dataclass(frozen=True)
class LossRow:
    """Of the loss: `block_n` columns at once, `programs` that share the rows."""

    block_n: int
    num_warps: int
    programs: int
    whole_row: bool  # in registers; else in blocks of columns, which are read several times


# 16 elements a thread: in bfloat16 two loads of 16 bytes. 512 divides the usual widths.
ALONG_ROWS = Tile(4, 512)
# Neither direction of a transposed source is then read or written in pieces below 64 bytes
ACROSS_ROWS = Tile(64, 32)
SUMS = Tile(64, 32)


def tile(columns: int, column_stride: int = 1) -> Tile:
    """For rows of `columns` elements that lie `column_stride` apart in the source."""
    if column_stride != 1:
        return ACROSS_ROWS
    elements = ALONG_ROWS.block_m * ALONG_ROWS.block_n
    block_n = min(next_power_of_2(columns), ALONG_ROWS.block_n)
    return Tile(elements // block_n, block_n)


def programs_along_rows(rows: int, columns: int, blocks: Tile) -> int:
    """How many programs share the rows of a column block, where each sums up its columns.

    Few, as each writes its sums: a row of float32 for at least 64 rows read and written. But
    enough to fill a GPU.
    """
    column_blocks = cdiv(columns, blocks.block_n)
    return min(cdiv(rows, blocks.block_m), max(cdiv(rows, 64), cdiv(FILL, column_blocks)))


def loss_row(rows: int, columns: int, itemsize: int, sums: bool) -> LossRow:
    """The loss of `rows` rows; itemsize: bytes of an element of the statistics' dtype.

    A row stays in registers if z, t and the sums take up to half of them: with more, sm_80 to
    sm_100 spill.
    """
    words = itemsize // 4
    programs = rows
    if sums:  # a row of sums is written and read for at least 16 rows, or to fill a GPU
        programs = min(rows, max(cdiv(rows, 16), FILL // 2))
    block_n = next_power_of_2(columns)
    live = block_n * words * (3 if sums else 2)
    if live > REGISTERS // 2:
        return LossRow(COLUMN_BLOCK // words, 8, programs, whole_row=False)
    # In bfloat16 up to 512 columns take one warp, 16 a thread: no two warps share a column
    num_warps = min(max(1, block_n * words // 512), MOST_WARPS)
    return LossRow(block_n, num_warps, programs, whole_row=True)


def most_registers(num_warps: int) -> int | None:
    """A thread's, for the loss of whole rows; None: what the assembler takes to be best.

    For sm_80 it cuts programs of 8 warps to 64 registers, so that four fit, and spills. With 80
    three do, as on the others.
    """
    return 80 if num_warps == 8 else None


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)
