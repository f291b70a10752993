# SPDX-License-Identifier: Apache-2.0
"""Liger-Kernel's scheme applied to this head, and its own class where the package is installed.

The losses in `liger_kernel.chunked_loss` (LigerFusedLinearCosineSimilarityLoss among them) walk
over chunks of 1024 rows; a compiled function gives a chunk's loss with its gradients by
torch.func.grad_and_value and adds the weights' to accumulators in the weights' dtype. All of this
happens in forward; backward multiplies by the upstream factor, unless that is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.ops.dtypes import matmul_dtype

CHUNK_ROWS = 1024


def _chunk_loss(
    h: Tensor, weights: list[Tensor], biases: list[Tensor], t: Tensor, count: int
) -> Tensor:
    z = h
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        z = F.linear(F.gelu(z) if layer else z, weight, bias)
    return -F.cosine_similarity(z.float(), t.float(), dim=-1).sum() / count


def _accumulate_chunk(
    h: Tensor,
    t: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    totals: list[Tensor],
    loss: Tensor,
    count: int,
) -> Tensor:
    """Adds to the loss and the totals (dW..., db...); returns dh of the chunk."""
    gradients = torch.func.grad_and_value(_chunk_loss, argnums=(0, 1, 2))
    (dh, dws, dbs), value = gradients(h, weights, biases, t, count)
    for total, gradient in zip(totals, [*dws, *dbs], strict=True):
        total.add_(gradient)
    loss.add_(value)
    return dh


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, accumulate: Callable[..., Tensor], depth: int, h: Tensor, t: Tensor, *head: Tensor
    ) -> Tensor:
        weights, biases = list(head[:depth]), list(head[depth:])
        totals = [torch.zeros_like(x) for x in head]
        loss = torch.zeros((), device=h.device)
        chunks = max(1, h.shape[0] // CHUNK_ROWS)
        dh = [
            accumulate(h_chunk, t_chunk, weights, biases, totals, loss, h.shape[0])
            for h_chunk, t_chunk in zip(h.chunk(chunks), t.chunk(chunks), strict=True)
        ]
        ctx.save_for_backward(torch.cat(dh), *totals)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        dh, *totals = ctx.saved_tensors
        if torch.ne(grad_loss, torch.ones_like(grad_loss)):
            dh, *totals = [x * grad_loss for x in (dh, *totals)]
        return (None, None, dh, None, *totals)


def liger_scheme() -> Callable[..., Tensor]:
    """The loss; its first call compiles."""
    accumulate = torch.compile(_accumulate_chunk, fullgraph=True, dynamic=False)

    def loss(
        hidden: Tensor,
        anchor: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        visual_index: Tensor | None = None,
    ) -> Tensor:
        dtype, h, t = matmul_dtype(hidden), hidden, anchor
        if visual_index is not None:
            h, t = h.index_select(0, visual_index), t.index_select(0, visual_index)
        # cast once, not once a chunk
        head = [x.to(dtype) for x in (*weights, *biases)]
        return _Chunked.apply(accumulate, len(weights), h.to(dtype), t, *head)

    return loss


def liger_package_loss() -> Callable[..., Tensor]:
    """liger_kernel's own cosine loss, for a linear head.

    Its interface multiplies the target by a teacher's matrix, the identity here, so it does a
    fourth matmul. Its loss is 1 - cos, ours -cos: the gradients are the same.

    Raises:
        ImportError: the package is not installed.
    """
    from liger_kernel.chunked_loss import (  # type: ignore[import-not-found]
        LigerFusedLinearCosineSimilarityLoss,
    )

    module = LigerFusedLinearCosineSimilarityLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, chunk_size=CHUNK_ROWS
    )
    constants: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def loss(
        hidden: Tensor,
        anchor: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        visual_index: Tensor,
    ) -> Tensor:
        h, t = hidden.index_select(0, visual_index), anchor.index_select(0, visual_index)
        size = (h.shape[0], t.shape[1])
        if size not in constants:
            labels = torch.zeros(size[0], dtype=torch.int64, device=h.device)
            constants[size] = torch.eye(size[1], dtype=t.dtype, device=t.device), labels
        teacher, labels = constants[size]
        return module(h, weights[0], t, teacher, labels, biases[0]) - 1

    return loss
