"""Losses of tokens and their gradient: which kernel, and its launch."""

from torch import Tensor

from prereg_kernels.ops.arguments import Spec
from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.launch import index_stride, launch, stat_dtype
from prereg_kernels.ops.backends.triton.loss_blocks import loss_blocks_kernel
from prereg_kernels.ops.backends.triton.loss_row import loss_row_kernel
from prereg_kernels.ops.backends.triton.sums import add_partials


def token_losses(
    z: Tensor,
    bias: Tensor | None,
    anchor: Tensor,
    index: Tensor | None,
    spec: Spec,
    losses: Tensor,
    coefficient: Tensor | None = None,
    dz: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """losses (n,) of z (n, A) + bias and anchor[index]; dz with a coefficient (n,); its sums (A,).

    Neither coefficient nor dz: losses alone. dz may be z.
    """
    rows, columns = z.shape
    chosen = config.loss_row(rows, columns, losses.itemsize, sums is not None)
    partials = None if sums is None else sums.new_empty(chosen.programs, columns)
    launch(
        loss_row_kernel if chosen.whole_row else loss_blocks_kernel,
        (chosen.programs,), chosen.num_warps,
        z, bias, anchor, index, coefficient, losses, dz, partials, rows, anchor.shape[0],
        z.stride(0), *anchor.stride(), index_stride(index),
        0 if coefficient is None else coefficient.stride(0), 0 if dz is None else dz.stride(0),
        COLUMNS=columns, EPS=spec.eps, LOSS=spec.loss,
        NORMALIZE="l2" if spec.loss == "cosine" else spec.normalize,
        STAT=stat_dtype(losses), BLOCK_N=chosen.block_n,
    )  # fmt: skip
    if sums is not None and partials is not None:
        add_partials(partials, sums)
