# SPDX-License-Identifier: Apache-2.0
"""Losses of tokens and their gradient: which kernel, and its launch."""

from functools import lru_cache

import torch

from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.compiled import MOST_KEPT, Variant
from prereg_kernels.ops.backends.triton.launch import (
    index_stride,
    launch,
    multiprocessors,
    stat_dtype,
)
from prereg_kernels.ops.backends.triton.loss_blocks import loss_blocks_kernel
from prereg_kernels.ops.backends.triton.loss_row import loss_row_kernel
from prereg_kernels.ops.backends.triton.sums import sum_partials
from prereg_kernels.ops.losses import LOSSES
from prereg_kernels.ops.spec import Spec


@lru_cache(maxsize=MOST_KEPT)
def _variant(
    block_n: int,
    num_warps: int,
    most_registers: int | None,
    columns: int,
    dtype: torch.dtype,
    loss: str,
    normalize: str,
    eps: float,
) -> Variant:
    normalization = LOSSES.find(loss).normalization(normalize)
    return Variant(
        num_warps,
        # Deviations of two rows take more
        most_registers=None if normalization == "layer" else most_registers,
        COLUMNS=columns, EPS=eps, LOSS=loss, NORMALIZE=normalization, STAT=stat_dtype(dtype),
        BLOCK_N=block_n,
    )  # fmt: skip


def token_losses(chunk: LossChunk, spec: Spec) -> None:
    """The losses of the chunk, and with `dz` their gradient and its column sums."""
    z, bias, anchor, index, losses, coefficient, dz, sums = chunk
    rows, columns = z.shape
    chosen = config.loss_row(
        rows, columns, losses.itemsize, sums is not None, multiprocessors(z.device)
    )
    partials = None if sums is None else sums.new_empty(chosen.programs, columns)
    launch(
        loss_row_kernel if chosen.whole_row else loss_blocks_kernel,
        (chosen.programs, 1, 1),
        _variant(
            chosen.block_n, chosen.num_warps, chosen.most_registers, columns, losses.dtype,
            spec.loss, spec.normalize, spec.eps,
        ),
        (z, bias, anchor, index, coefficient, losses, dz, partials),
        (
            rows, anchor.shape[0], z.stride(0), *anchor.stride(), index_stride(index),
            0 if coefficient is None else coefficient.stride(0), 0 if dz is None else dz.stride(0),
        ),
    )  # fmt: skip
    if sums is not None and partials is not None:
        sum_partials(partials, sums)
