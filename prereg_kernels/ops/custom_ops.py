"""The torch custom ops of the loss: its value, and its value with its gradients.

Both are functional, take N-dimensional tensors as the caller has them, and run below autograd.
`prereg::pre_losses` gets its gradients from `prereg::pre_gradients`; the gradients of the latter's
first output are the others, which it has computed already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.ops.arguments import Inputs, Spec, check_anchor_rows, is_mask
from prereg_kernels.ops.backends.base import Rows
from prereg_kernels.ops.backends.registry import choose_rows
from prereg_kernels.ops.chunking import choose_chunk_rows, chunk_budget, operand_dtype
from prereg_kernels.ops.pipeline import Head, Needs, Problem, losses_and_gradients, losses_only
from prereg_kernels.ops.transforms import forbid_double_backward, forbid_forward_mode


def call_losses(hidden: Tensor, anchor: Tensor, inputs: Inputs, spec: Spec) -> Tensor:
    """(S,) losses, zero where a mask leaves a position out; gradients by recomputation."""
    return pre_losses(
        hidden, anchor, inputs.select, inputs.weights, inputs.biases, inputs.bias_layers, *spec
    )


def call_gradients(
    hidden: Tensor,
    anchor: Tensor,
    inputs: Inputs,
    spec: Spec,
    coefficient: Tensor,
    need_hidden: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
    residual: Tensor | None = None,
) -> list[Tensor]:
    """[sum(coefficient * losses), losses (S,), dh, *dW, *db] for coefficient (S,).

    dh has the shape of `hidden` and is added to `residual`, if given; what is not needed is empty.
    """
    forbid_forward_mode(hidden, *inputs.weights, *inputs.biases, coefficient, residual)
    return pre_gradients(
        hidden, anchor, inputs.select, inputs.weights, inputs.biases, inputs.bias_layers, *spec,
        coefficient, residual, need_hidden, list(need_weights), list(need_biases),
    )  # fmt: skip


@torch.library.custom_op("prereg::pre_losses", mutates_args=())
def pre_losses(
    hidden: Tensor,
    anchor: Tensor,
    select: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_layers: Sequence[int],
    activation: str,
    loss: str,
    normalize: str,
    eps: float,
    compute_dtype: torch.dtype,
    chunk_rows: int,
    backend: str,
) -> Tensor:
    """The op behind `call_losses`."""
    spec = Spec(activation, loss, normalize, eps, compute_dtype, chunk_rows, backend)
    spec = spec._replace(compute_dtype=operand_dtype(compute_dtype, hidden.device))
    with torch.autocast(hidden.device.type, enabled=False):
        problem = _flatten(hidden, anchor, select, weights, biases, bias_layers)
        rows = choose_rows(backend, hidden.device)
        losses = losses_only(problem, spec, rows, _chunk_rows(problem, spec, rows))
        return _to_slots(losses, select, problem.hidden_index)


@torch.library.custom_op("prereg::pre_gradients", mutates_args=())
def pre_gradients(
    hidden: Tensor,
    anchor: Tensor,
    select: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_layers: Sequence[int],
    activation: str,
    loss: str,
    normalize: str,
    eps: float,
    compute_dtype: torch.dtype,
    chunk_rows: int,
    backend: str,
    coefficient: Tensor,
    residual: Tensor | None,
    need_hidden: bool,
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
) -> list[Tensor]:
    """The op behind `call_gradients`."""
    spec = Spec(activation, loss, normalize, eps, compute_dtype, chunk_rows, backend)
    spec = spec._replace(compute_dtype=operand_dtype(compute_dtype, hidden.device))
    need_of = dict(zip(bias_layers, need_biases, strict=True))
    needs = Needs(need_hidden, need_weights, [need_of.get(i, False) for i in range(len(weights))])
    with torch.autocast(hidden.device.type, enabled=False):
        problem = _flatten(hidden, anchor, select, weights, biases, bias_layers)
        rows = choose_rows(backend, hidden.device)
        losses, (dh, dws, dbs) = losses_and_gradients(
            problem,
            spec,
            rows,
            _chunk_rows(problem, spec, rows),
            coefficient[problem.hidden_index] if is_mask(select) else coefficient,
            needs,
            None if residual is None else residual.reshape(-1, hidden.shape[-1]),
        )
        losses = _to_slots(losses, select, problem.hidden_index)
        gradients = [dh if dh is None else dh.view(hidden.shape), *dws]
        gradients += [dbs[layer] for layer in bias_layers]
        return [
            (losses * coefficient).sum(),
            losses,
            *(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients),
        ]


@torch.library.custom_op("prereg::store_value", mutates_args=("out",))
def store_value(out: Tensor, value: Tensor) -> None:
    """Write a 0-dim value where the tap's caller reads it: an op, so that compiled graphs can."""
    out.copy_(value)


@torch.library.custom_op("prereg::scale_rounding_once", mutates_args=())
def scale_rounding_once(x: Tensor, scale: Tensor, backend: str) -> Tensor:
    """x * scale in the dtype of x for a 0-dim scale, in one pass over 16-bit numbers."""
    out = torch.empty_like(x)
    if x.numel():
        rows, into = (y.view(-1, x.shape[-1]) for y in (x, out))
        choose_rows(backend, x.device).scatter_rows(rows, into, None, scale, False)
    return out


@scale_rounding_once.register_fake
def _(x: Tensor, scale: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x)


@store_value.register_fake
def _(out: Tensor, value: Tensor) -> None:
    return None


@pre_losses.register_fake
def _(hidden: Tensor, anchor: Tensor, select: Tensor | None, *args: Any) -> Tensor:
    spec = Spec(*args[3:])
    return hidden.new_empty(_slots(hidden, select), dtype=spec.stat_dtype)


@pre_gradients.register_fake
def _(
    hidden: Tensor,
    anchor: Tensor,
    select: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_layers: Sequence[int],
    *args: Any,
) -> list[Tensor]:
    spec = Spec(*args[:-5])
    need_hidden, need_weights, need_biases = args[-3:]
    needs = [need_hidden, *need_weights, *need_biases]
    return [
        hidden.new_empty((), dtype=spec.stat_dtype),
        hidden.new_empty(_slots(hidden, select), dtype=spec.stat_dtype),
        *(
            x.new_empty(x.shape) if need else hidden.new_empty(0)
            for x, need in zip([hidden, *weights, *biases], needs, strict=True)
        ),
    ]


def _losses_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, anchor, select, weights, biases, ctx.bias_layers, *spec = inputs
    ctx.spec = Spec(*spec)
    ctx.depth = len(weights)
    ctx.save_for_backward(hidden, anchor, select, *weights, *biases)


def _losses_backward(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
    hidden, anchor, select, *parameters = ctx.saved_tensors
    weights, biases = parameters[: ctx.depth], parameters[ctx.depth :]
    need_hidden, _, _, need_weights, need_biases, *_ = ctx.needs_input_grad
    inputs = Inputs(weights, biases, ctx.bias_layers, select, None, grad_losses.shape[0])
    with torch.no_grad():
        _, _, *gradients = call_gradients(
            hidden, anchor, inputs, ctx.spec, grad_losses, need_hidden, need_weights, need_biases
        )
    needs = [need_hidden, *need_weights, *need_biases]
    return _as_inputs(ctx, needs, gradients, [hidden, *parameters, grad_losses])


def _gradients_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, _, _, weights, biases, *_, need_hidden, need_weights, need_biases = inputs
    ctx.backend = inputs[12]
    ctx.needs = [need_hidden, *need_weights, *need_biases]
    ctx.depth = len(weights)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, *weights, *biases, *output[2:])


def _gradients_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    count = len(ctx.needs)
    saved = ctx.saved_tensors  # once: a checkpoint around the loss gives them out once
    inputs, gradients = saved[:count], saved[count:]
    scale = grads[0]
    if scale is None:  # the total was not used
        return _as_inputs(ctx, [False] * count, gradients, inputs)
    forbid_forward_mode(scale)
    with torch.no_grad():
        scaled = [scale_by(x, scale, ctx.backend) for x in gradients]
    return _as_inputs(ctx, ctx.needs, scaled, [*inputs, scale])


pre_losses.register_autograd(_losses_backward, setup_context=_losses_context)
pre_gradients.register_autograd(_gradients_backward, setup_context=_gradients_context)


def scale_by(x: Tensor, scale: Tensor, backend: str) -> Tensor:
    """x * scale for a 0-dim scale, in a new tensor, the product rounded once to the dtype of x."""
    if x.dtype.itemsize > 2:
        return x * scale
    if torch.compiler.is_compiling():  # which makes one pass of it
        return (x.to(scale.dtype) * scale).to(x.dtype)
    return scale_rounding_once(x, scale, backend)


def _as_inputs(
    ctx: Any, needs: Sequence[bool], gradients: list[Tensor], inputs: Sequence[Tensor]
) -> tuple[Any, ...]:
    """[dh, *dW, *db] in the structure of the op's arguments, None where none is needed."""
    gradients = forbid_double_backward(gradients, inputs)
    dh, *rest = (x if need else None for x, need in zip(gradients, needs, strict=True))
    # autograd's bookkeeping wants an empty list for an empty list, None for a list of numbers
    others: list[Any] = [[] if need == [] else None for need in ctx.needs_input_grad[5:]]
    return (dh, None, None, rest[: ctx.depth], rest[ctx.depth :], *others)


def _flatten(
    hidden: Tensor,
    anchor: Tensor,
    select: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_layers: Sequence[int],
) -> Problem:
    index = select.nonzero().squeeze(1) if is_mask(select) else select
    aligned = anchor.shape[:-1] != hidden.shape[:-1]  # one anchor row per visual token
    if aligned and index is not None:
        check_anchor_rows(anchor, hidden.shape[:-1], index.shape[0])
    bias_of = dict(zip(bias_layers, biases, strict=True))
    return Problem(
        hidden.reshape(-1, hidden.shape[-1]),
        anchor.reshape(-1, anchor.shape[-1]),
        index,
        None if aligned else index,
        Head(weights, [bias_of.get(layer) for layer in range(len(weights))]),
    )


def _chunk_rows(problem: Problem, spec: Spec, rows: Rows) -> int:
    if spec.chunk_rows:
        return spec.chunk_rows
    shapes = [(w.shape[0], w.shape[1]) for w in problem.head.weights]
    device, dtype = problem.hidden.device, spec.compute_dtype
    budget = chunk_budget(device, dtype, rows.has_wide_products(device, dtype))
    columns, itemsize = problem.hidden.shape[1], spec.compute_dtype.itemsize
    return choose_chunk_rows(problem.tokens, columns, shapes, itemsize, budget)


def _slots(hidden: Tensor, select: Tensor | None) -> Any:
    return select.shape[0] if select is not None else hidden.shape[:-1].numel()


def _to_slots(losses: Tensor, select: Tensor | None, index: Tensor | None) -> Tensor:
    """(N,) -> (S,)."""
    if not is_mask(select) or index is None:
        return losses
    return losses.new_zeros(select.shape[0]).index_copy_(0, index, losses)
