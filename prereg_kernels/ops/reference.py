# SPDX-License-Identifier: Apache-2.0
"""The definition of truth: Predictive Regularization in plain PyTorch (arXiv 2603.20808).

    u = W1 h + b1,   g = act(u),   z = W2 g + b2,   loss = -cos(z, t)

for the paper's head. h are the visual tokens' hidden states after layer l. The anchor t is the
features that entered the LLM, held constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.ops.activations import ACTIVATIONS, Activation, ActivationName
from prereg_kernels.ops.arguments import check_inputs, token_coefficients
from prereg_kernels.ops.dtypes import DTYPES, matmul_dtype
from prereg_kernels.ops.layouts import batch_first
from prereg_kernels.ops.losses import LOSSES, Loss, LossName
from prereg_kernels.ops.names import LayoutName, NormalizationName, ReductionName
from prereg_kernels.ops.spec import check_reduction, check_spec


def eager_pre_loss(
    hidden: Tensor,
    anchor: Tensor,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor | None] | None = None,
    *,
    visual_mask: Tensor | None = None,
    visual_index: Tensor | None = None,
    token_weight: Tensor | None = None,
    layout: LayoutName = "bsh",
    activation: ActivationName | Activation = "gelu",
    loss: LossName | Loss = "cosine",
    normalize: NormalizationName = "none",
    reduction: ReductionName = "mean",
    denominator: float | Tensor | None = None,
    eps: float = 1e-8,
    upcast: torch.dtype | None = None,
) -> Tensor:
    """The PRe loss by ordinary autograd, with the arguments and the result of `fused_pre_loss`.

    Args:
        upcast: compute everything in this dtype. `torch.float64` makes the reference that the
            tests measure against. None: the matmuls run in the dtype of `hidden` or of autocast,
            and the loss in float32 (float64 for float64 inputs).

    Example:
        >>> hidden, anchor = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
        >>> eager_pre_loss(hidden, anchor, loss="mse", upcast=torch.float64)  # (1 + 4) / 2
        tensor(2.5000, dtype=torch.float64)
        >>> eager_pre_loss(hidden, anchor, [torch.eye(2)], loss="mse", reduction="none")
        tensor([2.5000])
    """
    check_reduction(reduction, denominator)
    if upcast is not None and upcast not in DTYPES:
        raise TypeError(f"upcast: expected None or a floating torch.dtype, got {upcast!r}")
    hidden, anchor = batch_first(hidden, anchor, layout)
    inputs = check_inputs(
        hidden, anchor, weights, biases, visual_mask, visual_index, token_weight, denominator
    )
    dtype = matmul_dtype(hidden) if upcast is None else upcast
    spec = check_spec(activation, loss, normalize, eps, dtype)

    h, t = _select_rows(hidden, inputs.select), anchor.detach()
    t = _select_rows(t, inputs.select) if t.shape[:-1] == hidden.shape[:-1] else t
    z, activate = h.to(dtype), ACTIVATIONS.find(spec.activation)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are spelled out
        for layer, (weight, bias) in enumerate(zip(*inputs.head, strict=True)):
            z = activate(z) if layer > 0 else z
            z = F.linear(z, weight.to(dtype), None if bias is None else bias.to(dtype))
        z, t = z.to(spec.stat_dtype), t.to(spec.stat_dtype)
        losses = LOSSES.find(spec.loss).of_rows(z, t, spec.normalize, spec.eps)

    per_slot = inputs.token_weight
    if reduction != "none":
        per_slot = token_coefficients(inputs, reduction, denominator, losses)
    if per_slot is not None:  # a mask's slots are all positions, an index's are the tokens
        masked = visual_mask is not None and inputs.select is not None
        per_token = per_slot[inputs.select] if masked else per_slot
        losses = losses * per_token.to(losses.dtype)
    return losses if reduction == "none" else losses.sum()


def _select_rows(x: Tensor, select: Tensor | None) -> Tensor:
    """(..., C) -> (N, C)."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if select is None else rows[select]
