# SPDX-License-Identifier: Apache-2.0
"""fused_pre_loss: the public loss of Predictive Regularization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prereg_kernels.ops.activations import Activation, ActivationName
from prereg_kernels.ops.arguments import check_inputs, is_mask, token_coefficients
from prereg_kernels.ops.backends.registry import BACKENDS, BackendName
from prereg_kernels.ops.custom_ops import call_losses, call_total
from prereg_kernels.ops.dtypes import matmul_dtype
from prereg_kernels.ops.layouts import batch_first
from prereg_kernels.ops.losses import Loss, LossName
from prereg_kernels.ops.names import LayoutName, NormalizationName, ReductionName
from prereg_kernels.ops.pipeline import power_of_two
from prereg_kernels.ops.reference import eager_pre_loss
from prereg_kernels.ops.spec import check_name, check_reduction, check_spec
from prereg_kernels.ops.transforms import forbid_forward_mode, is_transforming


def fused_pre_loss(
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
    recompute: bool = False,
    chunk_rows: int | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Predictive Regularization (arXiv 2603.20808): `-mean_i cos(f(hidden_i), anchor_i)`.

    `f` is an MLP given by `weights` and `biases`, and i runs over the visual tokens. The loss is
    computed in chunks of rows, forward and backward together. For the paper's two-layer head that
    takes six matmuls.

    Args:
        hidden: (..., D), any strides: hidden states after a middle layer. float16, bfloat16,
            float32 or float64.
        anchor: (..., A) with the same leading shape, or (N, A), one row for each visual token. If
            both readings fit, the leading shape is meant. A constant: no gradient flows into it.
            Any floating dtype.
        weights: the head's matrices in `nn.Linear` layout, with the activation between them. ()
            is no head (then D == A), one matrix is a linear head, and two are the paper's (M, D)
            and (A, M). More are allowed. Their dtype may differ from that of `hidden`, as with
            float32 master weights.
        biases: None, or one entry per weight: a Tensor (out_features,) or None.
        visual_mask: bool, the leading shape: which positions are visual tokens.
        visual_index: int64 (N,), unique, into the flattened leading dimensions. It replaces the
            mask, and saves the device synchronisation that a mask needs. With neither, every
            position is a visual token.
        token_weight: non-negative, the leading shape or (N,). If both fit, the leading shape is
            meant. A constant, like the denominator: no gradient flows into it.
        layout: "bsh", or "sbh" if `hidden` is (S, B, D), as in Megatron. Then `anchor` is (S, B,
            A) or (N, A). Everything else is as with "bsh", with (B, S) for "the leading shape",
            and the result is bitwise the same. Rows that a mask or an index selects are read
            in place.
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu"; or an `Activation` of your own.
        loss: "cosine" (the negative of `F.cosine_similarity`); or "mse", "smooth_l1" (beta 1),
            "l1" or "huber" (`F.huber_loss` with delta 0.5), averaged over the features; or a
            `Loss` of your own.
        normalize: "none", "l2" or "layer" (zero mean, unit variance, no affine). It is applied to
            prediction and anchor before any loss but the cosine.
        reduction: "mean", "sum", or "none" for (N,) losses in index order.
        denominator: what "mean" divides by, a positive number or a 0-dim Tensor: the visual-token
            count of the global batch under data parallelism or gradient accumulation. None: the
            sum of the token weights (N without weights). A Tensor may be 0, as in a step without
            visual tokens. With visual tokens a 0 is an error on the CPU. Elsewhere the value
            cannot be read without waiting, so the loss and its gradients are then 0.
        eps: positive. Norms are clamped from below by it, and variances are increased by it.
        recompute: False computes the gradients together with the loss. That takes six matmuls, and
            holds the gradients until backward, which multiplies them by the upstream factor. In
            bfloat16 and float16 this is one more rounding, unless the factor is a power of two.
            True computes the gradients in backward, which takes eight matmuls and holds nothing.
            reduction="none" always does the latter.
        chunk_rows: rows in a chunk. None leaves the choice to a heuristic.
        backend: "auto", "triton" (GPUs), "cpp" (CPUs) or "torch", which takes everything. "auto" is
            the fastest that runs on the device and has kernels for the loss and the activation.

    Returns:
        The loss, float32 (float64 for float64 `hidden`), 0-dim, or (N,) for reduction="none".
        Without visual tokens it is exactly 0, with zero gradients for `hidden` and every weight.
        In torch.func's transforms (grad, vjp, jacrev, vmap) `eager_pre_loss` computes it.

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong. The message names it, what came
            and what was expected. Values (weights, indices, the denominator) are checked on the
            CPU only.
        RuntimeError: forward-mode derivatives or double backward. Use `eager_pre_loss` for them.

    Example:
        >>> hidden = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True)
        >>> anchor = torch.tensor([[4.0, 3.0], [5.0, 0.0]])
        >>> loss = fused_pre_loss(hidden, anchor)  # no head; cosines 0.96 and 0
        >>> round(loss.item(), 4)
        -0.48
        >>> loss.backward()
        >>> round(hidden.grad[1, 0].item(), 4)  # the second token turns to its anchor
        -0.25
    """
    check_reduction(reduction, denominator)
    check_name("backend", backend, BACKENDS)
    hidden, anchor = batch_first(hidden, anchor, layout)
    inputs = check_inputs(
        hidden, anchor, weights, biases, visual_mask, visual_index, token_weight, denominator
    )
    dtype = matmul_dtype(hidden)
    spec = check_spec(activation, loss, normalize, eps, dtype, chunk_rows, backend)
    if is_transforming():
        forbid_forward_mode(hidden, *inputs.parameters)
        return eager_pre_loss(
            hidden, anchor, weights, biases, visual_mask=visual_mask, visual_index=visual_index,
            token_weight=token_weight, activation=activation, loss=loss, normalize=normalize,
            reduction=reduction, denominator=denominator, eps=eps,
        )  # fmt: skip
    anchor = anchor.detach()

    if reduction == "none":
        losses, weight = call_losses(hidden, anchor, inputs, spec), inputs.token_weight
        if is_mask(inputs.select):
            index = inputs.select.nonzero().squeeze(1)
            losses, weight = losses[index], None if weight is None else weight[index]
        return losses if weight is None else losses * weight.to(losses.dtype)

    coefficient = token_coefficients(inputs, reduction, denominator, hidden)
    needs = [x.requires_grad for x in (hidden, *inputs.parameters)]
    later = recompute or torch.compiler.is_exporting()  # what needs a gradient then is not known
    if later or not any(needs) or not torch.is_grad_enabled():
        return (call_losses(hidden, anchor, inputs, spec) * coefficient).sum()

    # The gradients wait for the upstream factor: keep 1/N from underflowing in float16.
    shift = power_of_two(coefficient) if dtype == torch.float16 else None
    scaled = coefficient if shift is None else coefficient / shift
    total = call_total(hidden, anchor, inputs, spec, scaled, needs)
    return total if shift is None else total * shift
