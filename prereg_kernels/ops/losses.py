# SPDX-License-Identifier: Apache-2.0
"""The losses of a token: each a name and its definition in PyTorch.

A loss that is registered here works everywhere. `eager_pre_loss` computes it by the definition.
Plain PyTorch differentiates it. With backend="auto", plain PyTorch also runs what the other
backends have no kernel for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.ops import loss_gradients
from prereg_kernels.ops.formulas import Formula, Registry
from prereg_kernels.ops.names import NORMALIZATIONS, NormalizationName
from prereg_kernels.ops.normalizations import normalized

LossName = Literal["cosine", "mse", "smooth_l1", "l1", "huber"]
# (z, t, normalize, eps, with_grad) -> losses (n,), dloss/dz (n, A), which is empty unless asked for
ByHand = Callable[[Tensor, Tensor, str, float, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Loss(Formula):
    """The loss of a token: `formula(p, q, **parameters)` of predictions and targets.

    Predictions and targets are (n, A) and normalised already. The formula returns (n,), and each
    row's loss depends on that row alone.

    Attributes:
        normalizations: what `normalize=` may ask for. "none" is always allowed.
        own_normalization: the normalisation of the loss itself, if the caller asks for "none".
        by_hand: a function for plain PyTorch that returns losses and gradient of rows that are not
            normalised. It takes no parameters. None: autograd differentiates the formula.

    Example:
        >>> from prereg_kernels.ops import Loss
        >>> cubic = Loss("cubic", lambda p, q: (p - q).abs().pow(3).mean(dim=-1))
        >>> hidden, anchor = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
        >>> fused_pre_loss(hidden, anchor, loss=cubic).item()  # (1 + 8) / 2
        4.5
    """

    normalizations: tuple[NormalizationName, ...] = NORMALIZATIONS
    own_normalization: NormalizationName = "none"
    by_hand: ByHand | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.own_normalization != "none" and self.normalizations != ("none",):
            raise ValueError(
                f"normalizations: expected ('none',) with own_normalization="
                f"{self.own_normalization!r}, got {self.normalizations!r}"
            )

    def normalization(self, normalize: str) -> str:
        """The normalisation that applies where the caller asks for this one."""
        return self.own_normalization if normalize == "none" else normalize

    def of_rows(self, z: Tensor, t: Tensor, normalize: str, eps: float) -> Tensor:
        """(n,) losses of rows that are not normalised: the definition."""
        how = self.normalization(normalize)
        return self(normalized(z, how, eps), normalized(t, how, eps))


LOSSES = Registry(Loss, "loss", tensors=2, reduces=True)


def register_loss(loss: Loss) -> Loss:
    """Make a loss known by its name, for `loss=` and for files that name it.

    Args:
        loss: its formula is tried out on a few rows.

    Returns:
        The loss, which `loss=` takes too.

    Raises:
        ValueError: the name belongs to another formula, or the formula does not return one loss
            for each row.

    Example:
        >>> from prereg_kernels.ops import Loss, register_loss
        >>> power = Loss("power4", lambda p, q: (p - q).pow(4).mean(dim=-1))
        >>> register_loss(power).text
        'power4'
    """
    return LOSSES.register(loss)


def _cosine(p: Tensor, q: Tensor) -> Tensor:
    """The negative of `F.cosine_similarity`, with the clamp's true gradient."""
    return -(p * q).sum(dim=-1)


def _mse(p: Tensor, q: Tensor) -> Tensor:
    return F.mse_loss(p, q, reduction="none").mean(dim=-1)


def _smooth_l1(p: Tensor, q: Tensor) -> Tensor:
    return F.smooth_l1_loss(p, q, reduction="none").mean(dim=-1)


def _l1(p: Tensor, q: Tensor) -> Tensor:
    return F.l1_loss(p, q, reduction="none").mean(dim=-1)


def _huber(p: Tensor, q: Tensor, delta: float) -> Tensor:
    return F.huber_loss(p, q, reduction="none", delta=delta).mean(dim=-1)


register_loss(
    Loss(
        "cosine",
        _cosine,
        normalizations=("none",),
        own_normalization="l2",
        by_hand=loss_gradients.cosine,
    )
)
register_loss(Loss("mse", _mse, by_hand=loss_gradients.mse))
register_loss(Loss("smooth_l1", _smooth_l1, by_hand=loss_gradients.smooth_l1))
register_loss(Loss("l1", _l1))
register_loss(Loss("huber", _huber, parameters={"delta": 0.5}))
