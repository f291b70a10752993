# SPDX-License-Identifier: Apache-2.0
"""A matmul of tensor descriptors in Triton: what the fused matmuls have in common.

The operands come through descriptors (TMA on NVIDIA's Hopper and later), which fill with zeros what
lies beyond a matrix: ragged sizes need no masks here. A program computes every `num_programs`-th
tile of the product, in an order in which GROUP_M row blocks share the columns of the second operand
while these are in the L2 cache. Accumulators are float32.
"""

import triton
import triton.language as tl

# The interpreter's products of bfloat16 are those of the bits that stand for it
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_position(tile, row_blocks, column_blocks, GROUP_M: tl.constexpr):
    """Row and column block of a tile: GROUP_M row blocks, column block after column block."""
    group_tiles = GROUP_M * column_blocks
    first_row = (tile // group_tiles) * GROUP_M
    group_rows = tl.minimum(row_blocks - first_row, GROUP_M)
    within = tile % group_tiles
    return first_row + within % group_rows, within // group_rows


@triton.jit
def tile_product(
    x_desc,
    w_desc,
    row,
    column,
    K,
    W_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile at (row, column) of x W^T if W_TRANSPOSED, else of x W: [BLOCK_M, BLOCK_N], float32.

    x (M, K); W (N, K) in blocks of [BLOCK_N, BLOCK_K], or (K, N) in blocks of [BLOCK_K, BLOCK_N].
    """
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
        w = w_desc.load([column, k]).T if W_TRANSPOSED else w_desc.load([k, column])
        # [BLOCK_K, BLOCK_N]
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        accumulator = tl.dot(x, w, accumulator)
    return accumulator


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """The tile's columns in 2 or 4 parts: an epilogue needs registers for one at a time."""
    left, right = _halves(tile)
    if PARTS == 2:
        return left, right
    else:
        a, b = _halves(left)
        c, d = _halves(right)
        return a, b, c, d


@triton.jit
def _halves(tile):
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tile.reshape(rows, 2, columns // 2).permute(0, 2, 1))


@triton.jit
def row_numbers(index_ptr, offs_m, mask_m):
    """index[offs_m], or offs_m without an index; int64.

    Nothing is asserted: the same index was when the rows of the first operand were gathered.
    """
    rows = offs_m.to(tl.int64)
    if index_ptr is not None:
        rows = tl.load(index_ptr + offs_m, mask=mask_m, other=0)
    return rows
