# SPDX-License-Identifier: Apache-2.0
"""pre_tap: the identity on the hidden states, which adds PRe's gradient in the backward pass.

The gradient of the loss needs only a scalar from upstream. So all of the work can wait until the
backward pass reaches layer l. It takes six matmuls, recomputes nothing, and holds nothing in
between. Its scratch is allocated when the activations of all later layers are already freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prereg_kernels._util import private
from prereg_kernels.ops.activations import Activation, ActivationName
from prereg_kernels.ops.arguments import Inputs, check_inputs, is_mask, token_coefficients
from prereg_kernels.ops.backends.registry import BACKENDS, BackendName
from prereg_kernels.ops.custom_ops import call_gradients, call_losses, write_sum
from prereg_kernels.ops.dtypes import matmul_dtype
from prereg_kernels.ops.layouts import batch_first
from prereg_kernels.ops.loss import fused_pre_loss
from prereg_kernels.ops.losses import Loss, LossName
from prereg_kernels.ops.names import LayoutName, NormalizationName
from prereg_kernels.ops.probe import TapProbe
from prereg_kernels.ops.shares import Share, has_several, sum_over
from prereg_kernels.ops.spec import Spec, check_name, check_spec
from prereg_kernels.ops.transforms import forbid_double_backward, forgets_functions, without_grad
from prereg_kernels.ops.versions import check_versions, versions_of


def pre_tap(
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
    denominator: float | Tensor | None = None,
    eps: float = 1e-8,
    chunk_rows: int | None = None,
    backend: BackendName = "auto",
    compute_value: bool = False,
    value_out: Tensor | None = None,
    carry: float | Tensor | None = None,
    carry_always: bool = False,
    group: Any = None,
    same_hidden: bool = True,
    probe: TapProbe | None = None,
) -> tuple[Tensor, Tensor]:
    """Pass `hidden` on unchanged, and return a scalar whose gradient is that of the PRe loss.

    Backward adds `grad_loss * dL/dhidden` to the gradient of `hidden`. Use both results:

        hidden, pre = pre_tap(hidden, anchor, weights, biases, visual_index=index)
        ...                                    # the later layers read `hidden`
        (lm_loss + 0.5 * pre).backward()

    Args:
        compute_value: whether the scalar holds the loss at once, at two more matmuls. False: it is
            0 in the forward pass, and holds the loss once backward has been through it. So combine
            it linearly, by factors that are not trained. The gradient is the same. In torch.func's
            transforms and torch.export this is always True.
        value_out: a 0-dim Tensor without gradient that backward writes the loss into. Under
            torch.compile only this gives the loss, because the scalar itself does not change.
        carry: a number or 0-dim Tensor for code that does not use the loss: the gradient of your
            objective with respect to it. Backward then adds `carry * dL/dhidden` by itself, as
            long as `hidden` is used. A backward pass that keeps the graph may be one of several,
            so it adds nothing. None: an unused loss has no gradient.
        carry_always: True: the loss is only for reading. Backward always adds `carry * dL/dhidden`,
            and the loss itself has no gradient. Under torch.compile that holds whenever `carry`
            is given.
        group: a process group of ranks with the same parameters, over which nobody else reduces
            the gradients, as in tensor parallelism. All of its ranks have to make this call and
            its backward. None: this rank alone.
        same_hidden: True: the ranks have the same `hidden` and anchor, too. Each does its share of
            the tokens, and all get bitwise the same loss and gradients, those of all tokens.
            False: each has its own tokens, as in sequence-parallel regions of tensor parallelism.
            The head's gradients are summed over the group, `denominator` is for all of its tokens,
            and the loss is that of this rank's.
        The others: as for `fused_pre_loss` with reduction="mean".

    Returns:
        `hidden` (the same values, shape and dtype) and the loss, 0-dim, float32 (float64 for
        float64 `hidden`).

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as for `fused_pre_loss`. Also RuntimeError
            in backward, if a tensor that it reads was changed in place in the meantime; and for a
            `group` or `probe` under torch.compile, torch.export or torch.func.

    Example:
        >>> hidden, anchor = torch.ones(3, 2, requires_grad=True), torch.zeros(3, 2)
        >>> tapped, loss = pre_tap(hidden, anchor, loss="mse")
        >>> loss.item()  # not computed yet
        0.0
        >>> (tapped.sum() + 0.5 * loss).backward()
        >>> loss.item()
        1.0
        >>> round(hidden.grad[0, 0].item(), 4)  # 1 + 0.5 * 2 * 1 / (3 * 2)
        1.1667
    """
    check_name("backend", backend, BACKENDS)
    given = hidden
    hidden, anchor = batch_first(hidden, anchor, layout)
    inputs = check_inputs(
        hidden, anchor, weights, biases, visual_mask, visual_index, token_weight, denominator
    )
    spec = check_spec(activation, loss, normalize, eps, matmul_dtype(hidden), chunk_rows, backend)
    _check_value_out(value_out, hidden)
    group = _checked_group(group)
    _check_probe(probe)
    if forgets_functions():
        value = fused_pre_loss(
            hidden, anchor, weights, biases, visual_mask=visual_mask, visual_index=visual_index,
            token_weight=token_weight, activation=activation, loss=loss, normalize=normalize,
            denominator=denominator, eps=eps, chunk_rows=chunk_rows, backend=backend,
        )  # fmt: skip
        if value_out is not None:
            value_out.copy_(value.detach())
        return given.view_as(given), value
    coefficient = token_coefficients(inputs, "mean", denominator, hidden)
    share = None
    if group is not None and same_hidden:
        share = Share(hidden, anchor.detach(), inputs, coefficient, group)
        anchor, inputs, coefficient = share.anchor, share.inputs, share.coefficient
        if not share.tokens:
            group = share = None
    carry_always = carry_always or (carry is not None and torch.compiler.is_compiling())
    tapped, value = _Tap.apply(
        hidden,
        anchor.detach(),
        inputs.select,
        coefficient,
        value_out,
        carry,
        _Settings(spec, inputs.bias_layers, compute_value, carry_always, group, share, probe),
        *inputs.parameters,
    )
    return tapped if hidden is given else tapped.transpose(0, 1), value


class _Settings(NamedTuple):
    """What the tap is told besides tensors."""

    spec: Spec
    bias_layers: list[int]
    compute_value: bool
    carry_always: bool
    group: Any
    share: Share | None
    probe: TapProbe | None


def _checked_group(group: Any) -> Any:
    """None where a group has this rank alone.

    Raises:
        RuntimeError: in a graph of torch.compile or under a transform.
    """
    if not has_several(group):
        return None
    if torch.compiler.is_compiling() or forgets_functions():
        raise RuntimeError(
            "group: expected None under torch.compile, torch.export and torch.func, got a process "
            "group of several ranks; compile the layers that have no tap, each by layer.compile()"
        )
    return group


def _check_probe(probe: Any) -> None:
    if probe is None:
        return
    if not isinstance(probe, TapProbe):
        raise TypeError(f"probe: expected a TapProbe, got {type(probe).__name__}")
    if torch.compiler.is_compiling() or forgets_functions():
        raise RuntimeError(
            "probe: expected None under torch.compile, torch.export and torch.func, got a TapProbe"
        )


def _check_value_out(value_out: Any, hidden: Tensor) -> None:
    if value_out is None:
        return
    if not isinstance(value_out, Tensor):
        raise TypeError(f"value_out: expected a Tensor, got {type(value_out).__name__}")
    if (
        value_out.dim() != 0
        or value_out.requires_grad
        or not value_out.is_floating_point()
        or value_out.device != hidden.device
    ):
        came = f"{value_out.dtype}, shape {tuple(value_out.shape)}, on {value_out.device}"
        raise ValueError(
            f"value_out: expected a 0-dim Tensor, floating, on {hidden.device}, that does not "
            f"require grad; got {came}, requires_grad={value_out.requires_grad}"
        )


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        select: Tensor | None,
        coefficient: Tensor,
        value_out: Tensor | None,
        carry: float | Tensor | None,
        settings: _Settings,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        spec, bias_layers, compute_value, carry_always, group, share, ctx.probe = settings
        ctx.spec, ctx.bias_layers, ctx.group, ctx.share = spec, bias_layers, group, share
        constants = anchor, select, coefficient
        ctx.in_graph = torch.compiler.is_compiling()
        if ctx.in_graph:  # which saves what it has to, and watches the versions of these alone
            ctx.save_for_backward(*constants, hidden, *parameters)
        else:
            # The constants stay outside of the saved-tensor hooks: under activation checkpointing
            # the recomputed forward then only has to bring back `hidden`, whatever anchor it is
            # shown.
            ctx.constants, ctx.versions = constants, versions_of(anchor, select)
            ctx.save_for_backward(hidden, *parameters)
        if compute_value:
            inputs = Inputs(list(parameters), bias_layers, select, None, coefficient.shape[0])
            value = (call_losses(hidden, anchor, inputs, spec) * coefficient).sum()
            if share is not None:
                sum_over(group, [value])
        else:
            value = coefficient.new_zeros(())
        if value_out is None and not compute_value and not torch.compiler.is_compiling():
            value_out = value.detach()  # shares the memory of the scalar that the caller gets
        ctx.value_out = value_out
        ctx.carry, ctx.carry_always, ctx.was_used = carry, carry_always, False
        ctx.set_materialize_grads(False)
        tapped = hidden.view_as(hidden)
        if carry_always:
            ctx.mark_non_differentiable(value)
        elif not ctx.needs_input_grad[0] and carry is None:
            ctx.mark_non_differentiable(tapped)
        return tapped, value

    @staticmethod
    def backward(
        ctx: Any, grad_hidden: Tensor | None, grad_value: Tensor | None
    ) -> tuple[Any, ...]:
        factor, share = _factor(ctx, grad_value), ctx.share
        need_hidden, *others = ctx.needs_input_grad
        if factor is None:  # the caller did not use the loss
            return (grad_hidden, *[None] * len(others))
        if ctx.in_graph:
            anchor, select, coefficient, hidden, *parameters = ctx.saved_tensors
        else:
            hidden, *parameters = ctx.saved_tensors
            anchor, select, coefficient = ctx.constants
            if not torch.compiler.is_compiling():
                names = "anchor", "visual_mask" if is_mask(select) else "visual_index"
                check_versions(ctx.versions, names, anchor, select)
                if not private.keeps_graph():
                    ctx.constants = ctx.share = None  # as autograd frees what it saved
        constants = len(others) - len(parameters)  # the arguments before the parameters
        needs = [need_hidden, *others[constants:]]
        inputs = Inputs(parameters, ctx.bias_layers, select, None, coefficient.shape[0])
        if isinstance(factor, Tensor) and factor.device != coefficient.device:
            factor = factor.to(coefficient.device)
        with without_grad():
            own = None  # of a share, what its rows get
            with nullcontext() if ctx.probe is None else ctx.probe.timing(hidden.device):
                if share is None:
                    losses, gradients = call_gradients(
                        hidden, anchor, inputs, ctx.spec, coefficient * factor, needs, grad_hidden
                    )
                else:
                    rows, targets = share.rows(hidden)
                    losses, gradients = call_gradients(
                        rows, targets, inputs._replace(select=None), ctx.spec,
                        coefficient * factor, needs,
                    )  # fmt: skip
                    own = gradients[0]
                value = None if ctx.value_out is None else losses * coefficient
                if ctx.group is not None:
                    sums = [x for x in gradients[1:] if x is not None]
                    if share is not None and value is not None:
                        value = value.sum()
                        sums.append(value)
                    sum_over(ctx.group, sums)
                if share is not None and need_hidden:
                    gradients[0] = share.add_rows(gradients[0], grad_hidden, hidden)
                if value is not None:
                    write_sum(ctx.value_out, value)
            if ctx.probe is not None and need_hidden:
                if own is None:
                    own = _own_rows(hidden, anchor, inputs, ctx.spec, coefficient * factor)
                arriving = None if grad_hidden is None else _rows_of(grad_hidden, inputs)
                ctx.probe.see(arriving, own)
                if share is not None:
                    sum_over(ctx.group, [ctx.probe.sums])
        upstream = [x for x in (grad_hidden, grad_value) if x is not None]
        dh, *rest = forbid_double_backward(gradients, [hidden, *parameters, *upstream])
        return (dh, *[None] * constants, *rest)


def _rows_of(x: Tensor, inputs: Inputs) -> Tensor:
    """(N, C): the rows of (..., C) that the tap reads."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if inputs.select is None else rows[inputs.select]


def _own_rows(
    hidden: Tensor, anchor: Tensor, inputs: Inputs, spec: Spec, coefficient: Tensor
) -> Tensor:
    """(N, D): what the tap adds to the gradient of each visual token, alone."""
    rows = _rows_of(hidden, inputs)
    is_whole = anchor.shape[:-1] == hidden.shape[:-1]  # else a row for each visual token
    targets = _rows_of(anchor, inputs) if is_whole else anchor
    if is_mask(inputs.select):
        coefficient = coefficient[inputs.select]
    needs = [True, *[False] * len(inputs.parameters)]
    alone = inputs._replace(select=None, slots=len(rows))
    _, (own, *_) = call_gradients(rows, targets, alone, spec, coefficient, needs)
    assert own is not None
    return own


def _factor(ctx: Any, grad_value: Tensor | None) -> float | Tensor | None:
    """The gradient of the loss: the caller's, or where there is none, what `carry` says."""
    ctx.was_used |= grad_value is not None
    if not ctx.carry_always:
        if ctx.was_used or ctx.carry is None:
            return grad_value
        if private.keeps_graph():
            return None
    return ctx.carry
