# SPDX-License-Identifier: Apache-2.0
"""Column sums of partial ones, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.compiled import Variant
from prereg_kernels.ops.backends.triton.launch import launch


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partials_ptr, sums_ptr, programs, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """sums[j] = sum_k partials[k, j].

    partials (programs, columns), contiguous; sums (columns,), in whose dtype everything is summed.

    Grid: (column blocks,).
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    total = tl.zeros([BLOCK_M, BLOCK_N], sums_ptr.dtype.element_ty)
    for start in range(0, programs, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        offs = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
        mask = (offs_m < programs)[:, None] & mask_n[None, :]
        total += tl.load(partials_ptr + offs, mask=mask, other=0)  # [BLOCK_M, BLOCK_N]
    tl.store(sums_ptr + offs_n, tl.sum(total, axis=0), mask=mask_n)


BLOCKS = config.SUMS
VARIANT = Variant(BLOCKS.num_warps, BLOCK_M=BLOCKS.block_m, BLOCK_N=BLOCKS.block_n)


def sum_partials(partials: Tensor, sums: Tensor) -> None:
    """sums (columns,) = the column sums of partials (programs, columns)."""
    programs, columns = partials.shape
    grid = config.cdiv(columns, BLOCKS.block_n), 1, 1
    launch(sum_partials_kernel, grid, VARIANT, (partials, sums), (programs, columns))
