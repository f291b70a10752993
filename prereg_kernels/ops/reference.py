"""The definition of truth: Predictive Regularization in plain PyTorch (arXiv 2603.20808).

    u = W1 h + b1,   g = act(u),   z = W2 g + b2,   loss = -cos(z, t)

for the paper's head, where h are the visual tokens' hidden states after layer l and the anchor t
is the features that entered the LLM, held constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.ops.arguments import (
    DTYPES,
    Spec,
    check_inputs,
    check_reduction,
    check_spec,
    matmul_dtype,
    token_coefficients,
)
from prereg_kernels.ops.names import ActivationName, LossName, NormalizationName, ReductionName

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def eager_pre_loss(
    hidden: Tensor,
    anchor: Tensor,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor | None] | None = None,
    *,
    visual_mask: Tensor | None = None,
    visual_index: Tensor | None = None,
    token_weight: Tensor | None = None,
    activation: ActivationName = "gelu",
    loss: LossName = "cosine",
    normalize: NormalizationName = "none",
    reduction: ReductionName = "mean",
    denominator: float | Tensor | None = None,
    eps: float = 1e-8,
    upcast: torch.dtype | None = None,
) -> Tensor:
    """The PRe loss by ordinary autograd: same arguments and result as `fused_pre_loss`.

    Args:
        upcast: compute everything in this dtype (`torch.float64` makes the reference that the
            tests measure against); None: the matmuls in the dtype of `hidden` or of autocast,
            the loss in float32 (float64 for float64 inputs).

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
    inputs = check_inputs(
        hidden, anchor, weights, biases, visual_mask, visual_index, token_weight, denominator
    )
    dtype = matmul_dtype(hidden) if upcast is None else upcast
    spec = check_spec(activation, loss, normalize, eps, dtype)

    h, t = _select_rows(hidden, inputs.select), anchor.detach()
    t = _select_rows(t, inputs.select) if t.shape[:-1] == hidden.shape[:-1] else t
    z = h.to(dtype)
    bias_of = dict(zip(inputs.bias_layers, inputs.biases, strict=True))
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are spelled out
        for layer, weight in enumerate(inputs.weights):
            bias = bias_of.get(layer)
            z = ACTIVATION_FUNCTIONS[activation](z) if layer > 0 else z
            z = F.linear(z, weight.to(dtype), None if bias is None else bias.to(dtype))
        losses = _token_losses(z.to(spec.stat_dtype), t.to(spec.stat_dtype), spec)

    per_slot = inputs.token_weight
    if reduction != "none":
        per_slot = token_coefficients(inputs, reduction, denominator, losses)
    if per_slot is not None:  # a mask's slots are all positions, an index's are the tokens
        masked = visual_mask is not None and inputs.select is not None
        per_token = per_slot[inputs.select] if masked else per_slot
        losses = losses * per_token.to(losses.dtype)
    return losses if reduction == "none" else losses.sum()


def _token_losses(z: Tensor, t: Tensor, spec: Spec) -> Tensor:
    """(N, A), (N, A) -> (N,)."""
    if spec.loss == "cosine":  # the value of F.cosine_similarity, with the clamp's true gradient
        return -(_l2_normalize(z, spec.eps) * _l2_normalize(t, spec.eps)).sum(dim=-1)
    if spec.normalize == "l2":
        z, t = _l2_normalize(z, spec.eps), _l2_normalize(t, spec.eps)
    elif spec.normalize == "layer":
        z = F.layer_norm(z, z.shape[-1:], eps=spec.eps)
        t = F.layer_norm(t, t.shape[-1:], eps=spec.eps)
    distance = F.mse_loss if spec.loss == "mse" else F.smooth_l1_loss
    return distance(z, t, reduction="none").mean(dim=-1)


def _l2_normalize(x: Tensor, eps: float) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)


def _select_rows(x: Tensor, select: Tensor | None) -> Tensor:
    """(..., C) -> (N, C)."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if select is None else rows[select]
