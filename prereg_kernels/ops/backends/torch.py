"""The row primitives in plain PyTorch: they run on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.ops.arguments import Spec
from prereg_kernels.ops.backends.base import Rows

_aten = torch.ops.aten


class TorchRows(Rows):
    name = "torch"

    def bias_left(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None

    def gather_rows(self, source: Tensor, index: Tensor | None, out: Tensor) -> None:
        out.copy_(_select(source, index))

    def activate(self, u: Tensor, bias: Tensor | None, activation: str, g: Tensor) -> None:
        assert bias is None
        if activation == "silu":
            _aten.silu.out(u, out=g)
        elif activation == "relu":
            torch.clamp_min(u, 0, out=g)
        else:
            _aten.gelu.out(u, approximate="tanh" if activation == "gelu_tanh" else "none", out=g)

    def activation_backward(
        self, dg: Tensor, u: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None
    ) -> None:
        assert bias is None
        if activation == "silu":
            _aten.silu_backward.grad_input(dg, u, grad_input=dg)
        elif activation == "relu":
            _aten.threshold_backward.grad_input(dg, u, 0, grad_input=dg)
        else:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            _aten.gelu_backward.grad_input(dg, u, approximate=approximate, grad_input=dg)
        _add_column_sums(sums, dg)

    def token_losses(
        self,
        z: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        index: Tensor | None,
        spec: Spec,
        losses: Tensor,
    ) -> None:
        assert bias is None
        losses.copy_(_losses_and_grad(z, _select(anchor, index), spec, with_grad=False)[0])

    def token_losses_and_grad(
        self,
        z: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        index: Tensor | None,
        coefficient: Tensor,
        spec: Spec,
        losses: Tensor,
        dz: Tensor,
        sums: Tensor | None,
    ) -> None:
        assert bias is None
        values, grad = _losses_and_grad(z, _select(anchor, index), spec, with_grad=True)
        losses.copy_(values)
        dz.copy_(grad.mul_(coefficient.unsqueeze(1)))
        _add_column_sums(sums, dz)

    def scatter_rows(
        self,
        values: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        accumulate: bool,
    ) -> None:
        values = (values if scale is None else values.to(scale.dtype) * scale).to(into.dtype)
        if index is None:
            into.add_(values) if accumulate else into.copy_(values)
        elif accumulate:
            into.index_add_(0, index, values)
        else:
            into.index_copy_(0, index, values)


def _select(source: Tensor, index: Tensor | None) -> Tensor:
    return source if index is None else source.index_select(0, index)


def _add_column_sums(sums: Tensor | None, values: Tensor) -> None:
    if sums is not None:
        sums += values.sum(dim=0, dtype=sums.dtype)


def _losses_and_grad(z: Tensor, t: Tensor, spec: Spec, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Losses (n,) and dloss/dz (n, A); the gradient is empty unless asked for."""
    z, t = z.to(spec.stat_dtype), t.to(spec.stat_dtype)
    if spec.loss == "cosine":
        return _cosine(z, t, spec.eps, with_grad)
    # p and q: the normalised prediction and target
    if spec.normalize == "none":
        p, q = z, t
    elif spec.normalize == "l2":
        z_norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        p = z / z_norm.clamp_min(spec.eps)
        q = t / torch.linalg.vector_norm(t, dim=1, keepdim=True).clamp_min(spec.eps)
    else:
        p, inverse_std = _standardize(z, spec.eps)
        q, _ = _standardize(t, spec.eps)

    difference = p - q
    if spec.loss == "mse":
        losses = difference.square().mean(dim=1)
    else:
        losses = F.smooth_l1_loss(p, q, reduction="none").mean(dim=1)
    if not with_grad:
        return losses, z.new_empty(0)
    dp = difference.mul_(2) if spec.loss == "mse" else difference.clamp_(-1, 1)
    dp /= z.shape[1]

    if spec.normalize == "l2":  # where |z| < eps the norm is a constant
        along = (p * dp).sum(dim=1, keepdim=True).masked_fill_(z_norm < spec.eps, 0)
        dp = (dp - p * along) / z_norm.clamp_min(spec.eps)
    elif spec.normalize == "layer":
        along = (p * dp).mean(dim=1, keepdim=True)
        dp = (dp - dp.mean(dim=1, keepdim=True) - p * along) * inverse_std
    return losses, dp


def _cosine(z: Tensor, t: Tensor, eps: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """loss = -c and dz = -(t / nt - c z / nz) / nz, with nz = max(|z|, eps), c = z.t / (nz nt).

    With p = z / nz and q = t / nt, the bracket is (q - p) + (1 - c) p, and for |p| = 1
    1 - c = (|q - p|^2 + 1 - |q|^2) / 2: nothing cancels near c = 1, where training spends its time.
    """
    z_norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    t_norm = torch.linalg.vector_norm(t, dim=1, keepdim=True)
    nz = z_norm.clamp_min(eps)
    p, q = z / nz, t / t_norm.clamp_min(eps)
    losses = -(p * q).sum(dim=1)
    if not with_grad:
        return losses, z.new_empty(0)
    q_short = (1 - q.square().sum(dim=1, keepdim=True)).masked_fill_(t_norm >= eps, 0)
    q -= p
    along = (q.square().sum(dim=1, keepdim=True) + q_short) / 2
    # where |z| < eps the norm is a constant; where c is 0, as of a zero target, 1 - c is exact
    along.masked_fill_((z_norm < eps) | (losses == 0).unsqueeze(1), 1)
    return losses, q.addcmul_(p, along).div_(-nz)


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance along each row, and the factor 1 / sqrt(variance + eps)."""
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    inverse_std = (variance + eps).rsqrt()
    return (x - mean) * inverse_std, inverse_std
