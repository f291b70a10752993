# SPDX-License-Identifier: Apache-2.0
"""Gradients of the losses by hand, for plain PyTorch: fewer passes and roundings than autograd's.

Each takes z and t (n, A) that are not normalised, in the dtype of the statistics, and returns the
losses (n,) and dloss/dz (n, A), which is empty unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(
    z: Tensor, t: Tensor, normalize: str, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
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


def mse(z: Tensor, t: Tensor, normalize: str, eps: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    return _of_difference(
        z, t, normalize, eps, with_grad,
        value=lambda p, q, d: d.square().mean(dim=1),
        slope=lambda d: d.mul_(2),
    )  # fmt: skip


def smooth_l1(
    z: Tensor, t: Tensor, normalize: str, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    return _of_difference(
        z, t, normalize, eps, with_grad,
        value=lambda p, q, d: F.smooth_l1_loss(p, q, reduction="none").mean(dim=1),
        slope=lambda d: d.clamp_(-1, 1),
    )  # fmt: skip


def _of_difference(
    z: Tensor,
    t: Tensor,
    normalize: str,
    eps: float,
    with_grad: bool,
    *,
    value: Callable[[Tensor, Tensor, Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """A mean over the features of a function of d = p - q; `slope` is its derivative, over d.

    p and q are the normalised prediction and target.
    """
    if normalize == "none":
        p, q = z, t
    elif normalize == "l2":
        z_norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        p = z / z_norm.clamp_min(eps)
        q = t / torch.linalg.vector_norm(t, dim=1, keepdim=True).clamp_min(eps)
    else:
        p, inverse_std = _standardize(z, eps)
        q, _ = _standardize(t, eps)

    difference = p - q
    losses = value(p, q, difference)
    if not with_grad:
        return losses, z.new_empty(0)
    dp = slope(difference)
    dp /= z.shape[1]

    if normalize == "l2":  # where |z| < eps the norm is a constant
        along = (p * dp).sum(dim=1, keepdim=True).masked_fill_(z_norm < eps, 0)
        dp = (dp - p * along) / z_norm.clamp_min(eps)
    elif normalize == "layer":
        along = (p * dp).mean(dim=1, keepdim=True)
        dp = (dp - dp.mean(dim=1, keepdim=True) - p * along) * inverse_std
    return losses, dp


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance along each row, and the factor 1 / sqrt(variance + eps)."""
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    inverse_std = (variance + eps).rsqrt()
    return (x - mean) * inverse_std, inverse_std
