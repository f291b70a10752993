# SPDX-License-Identifier: Apache-2.0
"""The row primitives in plain PyTorch: they run on any device, and take every loss."""

from __future__ import annotations

import torch
from torch import Tensor

from prereg_kernels.ops.activations import ACTIVATIONS
from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.derivative import value_and_vjp
from prereg_kernels.ops.dtypes import stat_dtype
from prereg_kernels.ops.losses import LOSSES
from prereg_kernels.ops.spec import Spec


class TorchBackend(Backend):
    name = "torch"

    def bias_left(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None

    def gather_rows(self, source: Tensor, index: Tensor | None, out: Tensor) -> None:
        out.copy_(_select(source, index))

    def activate(self, u: Tensor, bias: Tensor | None, activation: str, g: Tensor) -> None:
        assert bias is None
        act = ACTIVATIONS.find(activation)
        if act.into is not None:
            act.into(u, g)
        else:
            g.copy_(act(u.to(stat_dtype(u.dtype))))

    def activation_backward(
        self, dg: Tensor, u: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None
    ) -> None:
        assert bias is None
        act = ACTIVATIONS.find(activation)
        if act.backward_into is not None:
            act.backward_into(dg, u)
        else:
            stat = stat_dtype(u.dtype)
            dg.copy_(value_and_vjp(act, u.to(stat), dg.to(stat))[1])
        _write_column_sums(sums, dg)

    def token_losses(self, chunk: LossChunk, spec: Spec) -> None:
        assert chunk.bias is None
        z = chunk.z.to(spec.stat_dtype)
        t = _select(chunk.anchor, chunk.anchor_index).to(spec.stat_dtype)
        loss, how = LOSSES.find(spec.loss), (spec.normalize, spec.eps)
        coefficient, dz = chunk.coefficient, chunk.dz
        if dz is None or coefficient is None:
            by_hand = loss.by_hand and loss.by_hand(z, t, *how, False)[0]
            chunk.losses.copy_(loss.of_rows(z, t, *how) if by_hand is None else by_hand)
            return
        if loss.by_hand is not None:
            losses, gradient = loss.by_hand(z, t, *how, True)
            gradient.mul_(coefficient.unsqueeze(1))
        else:
            losses, gradient = value_and_vjp(
                lambda z, t: loss.of_rows(z, t, *how), z, coefficient, t
            )
        chunk.losses.copy_(losses)
        dz.copy_(gradient)
        _write_column_sums(chunk.sums, dz)

    def start_rows(self, into: Tensor, index: Tensor, residual: Tensor | None) -> Tensor | None:
        if residual is None:
            into.zero_()
            return None
        return into.copy_(residual)  # `index_add_` is one pass over the rows of the index

    def scatter_rows(
        self,
        values: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
    ) -> None:
        values = (values if scale is None else values.to(scale.dtype) * scale).to(into.dtype)
        if index is None:
            into.copy_(values) if residual is None else torch.add(residual, values, out=into)
        elif residual is into:
            into.index_add_(0, index, values)
        else:
            values = values if residual is None else values + residual.index_select(0, index)
            into.index_copy_(0, index, values)


def _select(source: Tensor, index: Tensor | None) -> Tensor:
    return source if index is None else source.index_select(0, index)


def _write_column_sums(sums: Tensor | None, values: Tensor) -> None:
    if sums is not None:
        torch.sum(values, dim=0, dtype=sums.dtype, out=sums)
