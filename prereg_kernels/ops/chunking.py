# SPDX-License-Identifier: Apache-2.0
"""Chunking: how many rows a chunk has, decided from shapes and dtypes alone.

Each chunk reads and writes the weight gradients once more, in float32. That is 8 bytes for each
element, against 2 n flops for each element in each of a layer's three matmuls. So a chunk needs
enough rows to hide this traffic, but not more than the scratch budget allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch


class ChunkBudget(NamedTuple):
    """Bounds on the rows of a chunk."""

    scratch_bytes: int
    least_rows: int  # with this many, accumulation takes less than 5% of the chunk's matmuls
    multiple: int  # of the matmul's tile, so that only the last chunk has a ragged edge


MIB = 2**20


def gpu_budget(total_memory: int) -> ChunkBudget:
    """The budget of a GPU with this much memory in total.

    Free memory is not read, because it changes, and the plan would change with it. Scratch gets a
    hundredth of the total, within bounds. The lower bound holds LLaVA's 32 images in one chunk,
    which needs no sums of weight gradients in float32. A small GPU gives a 32nd of its memory.
    """
    scratch = min(max(total_memory // 100, 640 * MIB), 1024 * MIB, total_memory // 32)
    # 790 TFLOP/s of bf16 and 4.3 TB/s (an H200): 4,900 rows for 5%
    return ChunkBudget(scratch, 4864, 128)


# 75 GFLOP/s of float32 a core and 10 GB/s: 200 rows for 5%; the matmul itself wants 512, and the
# passes over a chunk want it in the last-level cache. Measured: docs/performance.md
CPU = ChunkBudget(32 * MIB, 512, 16)
# 1.5 TFLOP/s of bfloat16 on two cores with tile registers
TILES = ChunkBudget(16 * MIB, 2048, 16)
# Where a product of low precision has no float32 result, one chunk is rounded once, as in eager
# PyTorch, but the weight gradients of several have to be computed in float32
NARROW = ChunkBudget(1024 * MIB, 4864, 128)


def chunk_budget(device: torch.device, dtype: torch.dtype, wide: bool) -> ChunkBudget:
    """The budget for matmul operands of this dtype.

    Args:
        wide: whether products of 16-bit operands are summed in float32.
    """
    if dtype.itemsize == 2 and not wide:
        return NARROW
    if device.type != "cpu":
        return gpu_budget(_total_memory(device))
    return TILES if dtype.itemsize == 2 else CPU


@cache
def _total_memory(device: torch.device) -> int:
    """Bytes, asked for once."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def choose_chunk_rows(
    count: int,
    columns: int,
    head_shapes: Sequence[tuple[int, int]],
    itemsize: int,
    budget: ChunkBudget,
) -> int:
    """How many rows a chunk has: as many as the scratch budget allows, evenly spread.

    Args:
        count: visual tokens N; columns: features D; head_shapes: (out, in) of each matrix;
        itemsize: bytes of an element of the matmuls' dtype.
    """
    row_bytes = itemsize * scratch_columns(columns, head_shapes)
    most = max(budget.least_rows, budget.scratch_bytes // row_bytes)
    chunks = max(1, -(-count // most))
    rows = -(-count // chunks)
    if chunks > 1:
        rows = -(-rows // budget.multiple) * budget.multiple
    return max(1, rows)


def scratch_columns(columns: int, head_shapes: Sequence[tuple[int, int]]) -> int:
    """Elements of scratch a row: h, u and g of every layer but the last, and z.

    Gradients are written over what they replace: dz over z, dg and du over g, dh over h.
    """
    outs = [out for out, _ in head_shapes]
    return columns + 2 * sum(outs[:-1]) + (outs[-1] if outs else columns)
