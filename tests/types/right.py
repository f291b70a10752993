# SPDX-License-Identifier: Apache-2.0
"""A user's script without a mistake: type checkers have nothing to say about it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer
from typing_extensions import assert_type

from prereg_kernels import (
    PRe,
    PReConfig,
    PReHead,
    apply_pre,
    eager_pre_loss,
    find_pre,
    fused_pre_loss,
    pre_tap,
    remove_pre,
)
from prereg_kernels.trainers import PReCallback, with_pre


def of_tensors(hidden: Tensor, anchor: Tensor, index: Tensor, weights: list[Tensor]) -> Tensor:
    loss = fused_pre_loss(
        hidden, anchor, weights, [None, None], visual_index=index, activation="silu", loss="mse",
        normalize="layer", reduction="mean", denominator=16, backend="cpp",
    )  # fmt: skip
    assert_type(loss, Tensor)
    assert_type(eager_pre_loss(hidden, anchor, tuple(weights), upcast=torch.float64), Tensor)
    hidden, term = pre_tap(hidden, anchor, weights, carry=0.5, value_out=torch.zeros(()))
    return loss + term + hidden.sum()


def of_a_head(hidden: Tensor, anchor: Tensor) -> Tensor:
    head = PReHead(8, 7, 6, depth=3, activation="gelu_tanh", dtype=torch.bfloat16)
    assert_type(head(hidden, anchor), Tensor)
    assert_type(head(hidden, anchor, tap=False, reduction="sum", recompute=True), Tensor)
    assert_type(head(hidden, anchor, tap=True, compute_value=True), tuple[Tensor, Tensor])
    hidden, term = head.tap(hidden, anchor, loss="smooth_l1", token_weight=None)
    return term


def of_a_model(model: nn.Module, batch: dict[str, Tensor], path: Path) -> dict[str, float]:
    config = PReConfig(layers=(8, 16), anchor="pre_projector", head_dtype="float32")
    config = config.replace(weight=1, level="global", gradient="tap")
    pre = apply_pre(model, config, from_pretrained=None, activation="relu", token_fraction=1.0)
    assert_type(pre, PRe)
    pre.denominator = pre.count(batch)
    assert_type(pre.heads[16], PReHead)
    pre.save(path)
    pre.load(str(path))
    torch.optim.AdamW(pre.parameter_groups(learning_rate=1e-5, weight_decay=0.1))
    metrics = find_pre(model).metrics()
    remove_pre(model)
    apply_pre(model, anchor=lambda inputs: inputs["embeddings"], anchor_features=64)
    return metrics


def of_trainers(model: nn.Module, path: Path) -> Trainer:
    cls = with_pre(Trainer, weight=0.3, family=None, from_pretrained=path, head_learning_rate=1e-3)
    callback = PReCallback(config=PReConfig(), layers=16)
    assert_type(callback.pre, PRe | None)
    return cls(model, callbacks=[callback])
