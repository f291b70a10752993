"""The row primitives in plain PyTorch: they run on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.inputs import Spec

_aten = torch.ops.aten


def gather_rows(source: Tensor, index: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    chunk = source[rows] if index is None else source.index_select(0, index[rows])
    return chunk.to(dtype)


def activate(u: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(u)
    if activation == "relu":
        return F.relu(u)
    return F.gelu(u, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_backward(dg: Tensor, u: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return _aten.silu_backward.grad_input(dg, u, grad_input=dg)
    if activation == "relu":
        return _aten.threshold_backward.grad_input(dg, u, 0, grad_input=dg)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return _aten.gelu_backward.grad_input(dg, u, approximate=approximate, grad_input=dg)


def token_losses(z: Tensor, t: Tensor, spec: Spec) -> Tensor:
    return _losses_and_grad(z, t, spec, with_grad=False)[0]


def token_losses_and_grad(
    z: Tensor, t: Tensor, coefficient: Tensor, spec: Spec, dz: Tensor
) -> Tensor:
    losses, grad = _losses_and_grad(z, t, spec, with_grad=True)
    dz.copy_(grad.mul_(coefficient.unsqueeze(1)))
    return losses


def scatter_rows(into: Tensor, index: Tensor | None, rows: slice, values: Tensor) -> None:
    if index is None:
        into[rows] += values
    else:
        into.index_add_(0, index[rows], values.to(into.dtype))


def add_column_sums(into: Tensor, values: Tensor) -> None:
    into += values.sum(dim=0, dtype=into.dtype)


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
    along.masked_fill_(z_norm < eps, 1)  # where |z| < eps the norm is a constant
    return losses, q.addcmul_(p, along).div_(-nz)


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance along each row, and the factor 1 / sqrt(variance + eps)."""
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    inverse_std = (variance + eps).rsqrt()
    return (x - mean) * inverse_std, inverse_std
