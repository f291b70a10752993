# SPDX-License-Identifier: Apache-2.0
"""A user's script with ten mistakes, on the lines that say so; never run."""

import torch
from torch import Tensor, nn
from transformers import Trainer

from prereg_kernels import (
    PReConfig,
    PReHead,
    apply_pre,
    eager_pre_loss,
    fused_pre_loss,
    pre_tap,
)
from prereg_kernels.trainers import PReCallback, with_pre


def of_tensors(hidden: Tensor, anchor: Tensor, weights: list[Tensor]) -> None:
    fused_pre_loss(hidden, anchor, weights, loss="cosin")  # wrong: cosine
    fused_pre_loss(hidden, anchor, weights, reduction="avg")  # wrong: mean
    pre_tap(hidden, anchor, weights, backend="cuda")  # wrong: triton
    eager_pre_loss([[0.5, 1.0]], anchor, weights)  # wrong: a Tensor


def of_a_head(anchor: Tensor) -> None:
    head = PReHead(8, 7, activation="swish")  # wrong: silu
    head("hidden", anchor)  # wrong: a Tensor
    head(torch.zeros(3, 8), anchor)


def of_a_model(model: nn.Module) -> None:
    PReConfig(token_fractoin=0.5)  # wrong: token_fraction
    apply_pre(model, wieght=0.5)  # wrong: weight
    pre = apply_pre(model, PReConfig(), level="patch")
    apply_pre(model, layers="16")  # wrong: 16
    with_pre(Trainer, wieght=0.5)  # wrong: weight
    PReCallback(layers="16")  # wrong: 16
    pre.metrics["pre_loss"]  # wrong: metrics()["pre_loss"]
