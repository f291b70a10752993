# SPDX-License-Identifier: Apache-2.0
"""Column sums of partial ones, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from prereg_kernels.ops.backends.triton import config
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


def sum_partials(partials: Tensor, sums: Tensor) -> None:
    """sums (columns,) = the column sums of partials (programs, columns)."""
    programs, columns = partials.shape
    blocks = config.SUMS
    launch(
        sum_partials_kernel, (config.cdiv(columns, blocks.block_n),), blocks.num_warps,
        (partials, sums), (programs, columns), BLOCK_M=blocks.block_m, BLOCK_N=blocks.block_n,
    )  # fmt: skip
