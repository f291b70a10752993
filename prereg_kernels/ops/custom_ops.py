# SPDX-License-Identifier: Apache-2.0
"""The torch custom ops of the loss: its value, and its value with its gradients.

Both are functional, take N-dimensional tensors as the caller has them, and run below autograd.
`prereg::pre_losses` gets its gradients from `prereg::pre_gradients`; the gradients of the latter's
first output are the others, which it has computed already.

In eager mode, where nobody sees an op but autograd, a call goes past them to the same code: the
dispatcher took a quarter of the host's time. See `is_plain`.

A mask's tokens are counted by the host, which waits for the device: nothing that a CUDA graph can
have in it. So calls with a mask are ops of their own, `prereg::masked_pre_losses` and
`prereg::masked_pre_gradients`: torch.compile(mode="reduce-overhead") runs them outside of its
graphs, and a call with an index inside of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.ops.arguments import Inputs, check_anchor_rows, is_mask
from prereg_kernels.ops.backends.base import Backend
from prereg_kernels.ops.backends.registry import choose_backend
from prereg_kernels.ops.chunking import ChunkBudget, choose_chunk_rows, chunk_budget
from prereg_kernels.ops.dtypes import operand_dtype, without_autocast
from prereg_kernels.ops.head_tensors import Head, by_layer
from prereg_kernels.ops.layouts import is_turned, of_rows, places_of, rows_of
from prereg_kernels.ops.pipeline import Needs, Problem, losses_and_gradients, losses_only
from prereg_kernels.ops.ranges import with_ranges
from prereg_kernels.ops.spec import Spec
from prereg_kernels.ops.transforms import (
    forbid_double_backward,
    forbid_forward_mode,
    is_plain,
    without_grad,
)


def call_losses(hidden: Tensor, anchor: Tensor, inputs: Inputs, spec: Spec) -> Tensor:
    """(S,) losses, zero where a mask leaves a position out; gradients by recomputation."""
    op = masked_pre_losses if is_mask(inputs.select) else pre_losses
    return op(hidden, anchor, inputs.select, inputs.parameters, inputs.bias_layers, spec.pack())


def call_gradients(
    hidden: Tensor,
    anchor: Tensor,
    inputs: Inputs,
    spec: Spec,
    coefficient: Tensor,
    needs: Sequence[bool],
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses (S,), and [dh, *gradients of inputs.parameters] of sum(coefficient * losses).

    coefficient (S,). dh has the shape of `hidden` and is added to `residual`, if given. `needs`
    says of hidden and of each parameter whether its gradient is needed; what is not is None. The
    results have no gradients themselves: this is for a backward pass, without grad.
    """
    forbid_forward_mode(hidden, *inputs.parameters, coefficient, residual)
    if is_plain(hidden, anchor, coefficient, *inputs.parameters):
        # The dispatcher's way there takes as long as a tenth of a call
        return _gradients(hidden, anchor, inputs, spec, coefficient, needs, residual)
    op = masked_pre_gradients if is_mask(inputs.select) else pre_gradients
    _, losses, *gradients = op(
        hidden, anchor, inputs.select, inputs.parameters, inputs.bias_layers, spec.pack(),
        coefficient, residual, [False, *needs],
    )  # fmt: skip
    return losses, [x if need else None for x, need in zip(gradients, needs, strict=True)]


def call_total(
    hidden: Tensor,
    anchor: Tensor,
    inputs: Inputs,
    spec: Spec,
    coefficient: Tensor,
    needs: Sequence[bool],
) -> Tensor:
    """sum(coefficient * losses), whose gradients are computed with it: see `call_gradients`."""
    forbid_forward_mode(hidden, *inputs.parameters, coefficient)
    if is_plain(hidden, anchor, coefficient, *inputs.parameters):
        settings = inputs._replace(parameters=[]), spec, needs
        total: Tensor = _Total.apply(hidden, anchor, coefficient, settings, *inputs.parameters)
        return total
    op = masked_pre_gradients if is_mask(inputs.select) else pre_gradients
    return op(
        hidden, anchor, inputs.select, inputs.parameters, inputs.bias_layers, spec.pack(),
        coefficient, None, [True, *needs],
    )[0]  # fmt: skip


def write_sum(out: Tensor, terms: Tensor) -> None:
    """out = the sum of the terms (S,) or (), 0-dim, where the tap's caller reads it."""
    if not is_plain(out, terms):
        store_value(out, terms.sum())
    elif out.dtype == terms.dtype:
        torch.sum(terms, dim=0, out=out)
    else:
        out.copy_(terms.sum())


def _pre_losses(
    hidden: Tensor,
    anchor: Tensor,
    select: Tensor | None,
    parameters: Sequence[Tensor],
    bias_layers: Sequence[int],
    spec: str,
) -> Tensor:
    """The op behind `call_losses`; the head and the spec are packed."""
    with without_autocast(hidden):
        index = _counted(select) if is_mask(select) else select
        problem = _flatten(hidden, anchor, index, Head.unpack(parameters, bias_layers))
        losses = losses_only(problem, *_decide(problem, Spec.unpack(spec)))
        return _to_slots(losses, select, index)


def _pre_gradients(
    hidden: Tensor,
    anchor: Tensor,
    select: Tensor | None,
    parameters: Sequence[Tensor],
    bias_layers: Sequence[int],
    spec: str,
    coefficient: Tensor,
    residual: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The op behind `call_total` and `call_gradients`: [total, losses, *gradients].

    The head and the spec are packed. `needs` says of the total, too, whether it is needed. What is
    not needed is empty.
    """
    need_total, *needs = needs
    inputs = Inputs(list(parameters), list(bias_layers), select, None, coefficient.shape[0])
    losses, gradients = _gradients(
        hidden, anchor, inputs, Spec.unpack(spec), coefficient, needs, residual
    )
    return [
        (losses * coefficient).sum() if need_total else losses.new_empty(0),
        losses,
        *(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients),
    ]


def _gradients(
    hidden: Tensor,
    anchor: Tensor,
    inputs: Inputs,
    spec: Spec,
    coefficient: Tensor,
    needs: Sequence[bool],
    residual: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """`call_gradients`, computed; what is not needed is None."""
    select, bias_layers = inputs.select, inputs.bias_layers
    need_hidden, *need_parameters = needs
    with without_autocast(hidden):
        index = _counted(select) if is_mask(select) else select
        problem = _flatten(hidden, anchor, index, inputs.head)
        losses, (dh, dws, dbs) = losses_and_gradients(
            problem,
            *_decide(problem, spec),
            coefficient[index] if is_mask(select) else coefficient,
            Needs(need_hidden, *by_layer(need_parameters, bias_layers)),
            None if residual is None else rows_of(residual, is_turned(hidden, select)),
        )
        if dh is not None:
            dh = of_rows(dh, hidden.shape, is_turned(hidden, select))
        return _to_slots(losses, select, index), [dh, *dws, *(dbs[i] for i in bias_layers)]


# The tag came with torch 2.9; before, `_counted` refuses
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
MASKED = () if _UNSAFE is None else (_UNSAFE,)
pre_losses = torch.library.custom_op("prereg::pre_losses", _pre_losses, mutates_args=())
masked_pre_losses = torch.library.custom_op(
    "prereg::masked_pre_losses", _pre_losses, mutates_args=(), tags=MASKED
)
pre_gradients = torch.library.custom_op("prereg::pre_gradients", _pre_gradients, mutates_args=())
masked_pre_gradients = torch.library.custom_op(
    "prereg::masked_pre_gradients", _pre_gradients, mutates_args=(), tags=MASKED
)


@torch.library.custom_op("prereg::store_value", mutates_args=("out",))
def store_value(out: Tensor, value: Tensor) -> None:
    """Write a 0-dim value where the tap's caller reads it: an op, so that compiled graphs can."""
    out.copy_(value)


@torch.library.custom_op("prereg::scale_rounding_once", mutates_args=())
def scale_rounding_once(x: Tensor, scale: Tensor, backend: str) -> Tensor:
    """x * scale in the dtype of x for a 0-dim scale, in one pass over 16-bit numbers."""
    out = torch.empty_like(x)
    if x.numel():
        turned = not x.is_contiguous()  # a gradient of hidden then: see `of_rows`
        rows, into = rows_of(x, turned), rows_of(out, turned)
        choose_backend(backend, x.device).scatter_rows(rows, into, None, scale, None)
    return out


@scale_rounding_once.register_fake
def _(x: Tensor, scale: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x)


@store_value.register_fake
def _(out: Tensor, value: Tensor) -> None:
    return None


@masked_pre_losses.register_fake
@pre_losses.register_fake
def _(
    hidden: Tensor,
    anchor: Tensor,
    select: Tensor | None,
    parameters: Sequence[Tensor],
    bias_layers: Sequence[int],
    spec: str,
) -> Tensor:
    return hidden.new_empty(_slots(hidden, select), dtype=Spec.unpack(spec).stat_dtype)


@masked_pre_gradients.register_fake
@pre_gradients.register_fake
def _(
    hidden: Tensor,
    anchor: Tensor,
    select: Tensor | None,
    parameters: Sequence[Tensor],
    bias_layers: Sequence[int],
    spec: str,
    coefficient: Tensor,
    residual: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    dtype = Spec.unpack(spec).stat_dtype
    turned = is_turned(hidden, select)
    dh = of_rows(hidden.new_empty(rows_of(hidden, turned).shape), hidden.shape, turned)
    gradients = [dh, *(x.new_empty(x.shape) for x in parameters)]
    need_total, *needs = needs
    return [
        hidden.new_empty(() if need_total else 0, dtype=dtype),
        hidden.new_empty(_slots(hidden, select), dtype=dtype),
        *(x if need else hidden.new_empty(0) for x, need in zip(gradients, needs, strict=True)),
    ]


def _losses_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, anchor, select, parameters, ctx.bias_layers, ctx.spec = inputs
    ctx.save_for_backward(hidden, anchor, select, *parameters)


def _losses_backward(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
    hidden, anchor, select, *parameters = ctx.saved_tensors
    need_hidden, _, _, need_parameters, *_ = ctx.needs_input_grad
    needs = [need_hidden, *need_parameters]
    inputs = Inputs(parameters, ctx.bias_layers, select, None, grad_losses.shape[0])
    with without_grad():
        _, gradients = call_gradients(
            hidden, anchor, inputs, Spec.unpack(ctx.spec), grad_losses, needs
        )
    dh, *rest = forbid_double_backward(gradients, [hidden, *parameters, grad_losses])
    return dh, None, None, rest, *map(_no_gradient, ctx.needs_input_grad[4:])


def _gradients_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, _, _, parameters, _, spec, _, _, (_, *needs) = inputs
    _, losses, *gradients = output
    ctx.mark_non_differentiable(losses, *gradients)
    _keep(ctx, Spec.unpack(spec).backend, needs, [hidden, *parameters], gradients)


def _gradients_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    dh, *rest = _scaled(ctx, grads[0])
    _hidden, _anchor, _select, _parameters, *others = ctx.needs_input_grad
    return dh, None, None, rest, *map(_no_gradient, others)


class _Total(torch.autograd.Function):
    """`pre_gradients` with its total, without the dispatcher, for where nobody sees it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        coefficient: Tensor,
        settings: tuple[Inputs, Spec, Sequence[bool]],
        *parameters: Tensor,
    ) -> Tensor:
        inputs, spec, needs = settings
        inputs = inputs._replace(parameters=list(parameters))
        losses, gradients = _gradients(hidden, anchor, inputs, spec, coefficient, needs, None)
        _keep(ctx, spec.backend, needs, [hidden, *parameters], gradients)
        return (losses * coefficient).sum()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        dh, *rest = _scaled(ctx, grad_total)
        return dh, None, None, None, *rest


def _keep(
    ctx: Any,
    backend: str,
    needs: Sequence[bool],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> None:
    """For `_scaled`: the gradients that are needed, of the total, by each of the inputs."""
    ctx.backend, ctx.needs = backend, needs
    ctx.set_materialize_grads(False)
    needed = (x if need else None for x, need in zip(gradients, needs, strict=True))
    ctx.save_for_backward(*inputs, *needed)


def _scaled(ctx: Any, scale: Tensor | None) -> Sequence[Tensor | None]:
    """What was kept, times the gradient of the total; None where nothing was, or no gradient is."""
    count = len(ctx.needs)
    saved = ctx.saved_tensors  # once: a checkpoint around the loss gives them out once
    inputs, gradients = saved[:count], saved[count:]
    if scale is None:  # the total was not used
        return [None] * count
    forbid_forward_mode(scale)
    with without_grad():
        scaled = [None if x is None else scale_by(x, scale, ctx.backend) for x in gradients]
    return forbid_double_backward(scaled, [*inputs, scale])


pre_losses.register_autograd(_losses_backward, setup_context=_losses_context)
masked_pre_losses.register_autograd(_losses_backward, setup_context=_losses_context)
pre_gradients.register_autograd(_gradients_backward, setup_context=_gradients_context)
masked_pre_gradients.register_autograd(_gradients_backward, setup_context=_gradients_context)


def scale_by(x: Tensor, scale: Tensor, backend: str) -> Tensor:
    """x * scale for a 0-dim scale, in a new tensor, the product rounded once to the dtype of x."""
    if x.dtype.itemsize > 2:
        return x * scale
    if torch.compiler.is_compiling():  # which makes one pass of it
        return (x.to(scale.dtype) * scale).to(x.dtype)
    return scale_rounding_once(x, scale, backend)


def _no_gradient(need: Any) -> Any:
    """Of an argument: autograd wants an empty list for an empty list, None for one of numbers."""
    return [] if need == [] else None


def _counted(mask: Tensor) -> Tensor:
    """(N,): the places where a mask (T,) is True. Waits for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured, which can wait for nothing.
    """
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "visual_mask: cannot be captured into a CUDA graph, as its tokens are counted by the "
            "host; expected visual_index"
        )
    return mask.nonzero().squeeze(1)


def _flatten(hidden: Tensor, anchor: Tensor, index: Tensor | None, head: Head) -> Problem:
    aligned = anchor.shape[:-1] != hidden.shape[:-1]  # one anchor row per visual token
    if aligned and index is not None:
        check_anchor_rows(anchor, hidden.shape[:-1], index.shape[0])
    turned, anchor_turned = is_turned(hidden, index), not aligned and is_turned(anchor, index)
    return Problem(
        rows_of(hidden, turned),
        rows_of(anchor, anchor_turned),
        places_of(index, hidden.shape, turned),
        None if aligned else places_of(index, anchor.shape, anchor_turned),
        head,
    )


def _decide(problem: Problem, spec: Spec) -> tuple[Spec, Backend]:
    """What is left open until the tensors are there: the dtype, the backend, the chunks."""
    device = problem.hidden.device
    backend = choose_backend(spec.backend, device, spec)
    dtype = operand_dtype(spec.compute_dtype, device)
    if not spec.chunk_rows or dtype != spec.compute_dtype:
        shapes = tuple([w.shape for w in problem.head.weights])
        budget = chunk_budget(device, dtype, backend.has_wide_products(device, dtype))
        spec = _decided(spec, dtype, problem.tokens, problem.hidden.shape[1], shapes, budget)
    return spec, with_ranges(backend)


@lru_cache(maxsize=1024)
def _decided(
    spec: Spec,
    dtype: torch.dtype,
    tokens: int,
    columns: int,
    shapes: tuple[tuple[int, int], ...],
    budget: ChunkBudget,
) -> Spec:
    """The spec with this dtype, and rows of a chunk where it has none."""
    rows = spec.chunk_rows
    if not rows:
        rows = choose_chunk_rows(tokens, columns, shapes, dtype.itemsize, budget)
    return spec._replace(compute_dtype=dtype, chunk_rows=rows)


def _slots(hidden: Tensor, select: Tensor | None) -> Any:
    return select.shape[0] if select is not None else hidden.shape[:-1].numel()


def _to_slots(losses: Tensor, select: Tensor | None, index: Tensor | None) -> Tensor:
    """(N,) -> (S,)."""
    if not is_mask(select) or index is None:
        return losses
    return losses.new_zeros(select.shape[0]).index_copy_(0, index, losses)
