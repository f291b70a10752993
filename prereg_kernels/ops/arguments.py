# SPDX-License-Identifier: Apache-2.0
"""The arguments of the PRe loss, checked once and put into one shape for every implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from prereg_kernels.ops.dtypes import DTYPES, stat_dtype
from prereg_kernels.ops.head_tensors import Head
from prereg_kernels.ops.transforms import PLAIN, is_wrapped

EXACT_INT = 2**24  # up to here float32 has every integer


class Inputs(NamedTuple):
    """The checked tensors. S slots carry a loss each: N with an index, else every position T."""

    parameters: list[Tensor]  # of the head, and
    bias_layers: list[int]  # which layers have a bias: see `Head.pack`
    select: Tensor | None  # (N,) int64 index, (T,) bool mask, or None for every position
    token_weight: Tensor | None  # (S,)
    slots: int  # S

    @property
    def head(self) -> Head:
        return Head.unpack(self.parameters, self.bias_layers)


def check_inputs(
    hidden: Tensor,
    anchor: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    visual_mask: Tensor | None,
    visual_index: Tensor | None,
    token_weight: Tensor | None,
    denominator: float | Tensor | None,
) -> Inputs:
    """Check every tensor argument of the loss (see `fused_pre_loss`) and normalise its form.

    Values are checked on the CPU only: looking at them on a GPU would wait for the device.

    Raises:
        TypeError: not a tensor, or a dtype that is not one of the kind expected.
        ValueError: shapes, devices or values that do not fit; both selectors.
        IndexError: an index out of range (on the CPU).
    """
    _check_tensor("hidden", hidden, hidden)
    _check_tensor("anchor", anchor, hidden)
    if hidden.dim() < 1 or anchor.dim() < 1:
        raise ValueError(
            f"hidden and anchor: expected shapes (..., D) and (..., A), "
            f"got {tuple(hidden.shape)} and {tuple(anchor.shape)}"
        )
    leading = hidden.shape[:-1]
    positions = math.prod(leading)
    if hidden.shape[-1] == 0 or anchor.shape[-1] == 0:
        raise ValueError(
            f"hidden and anchor: expected at least one feature, "
            f"got shapes {tuple(hidden.shape)} and {tuple(anchor.shape)}"
        )
    select = _check_selection(visual_mask, visual_index, hidden)
    slots = select.shape[0] if select is not None else positions
    if anchor.shape[:-1] != leading:
        tokens: int | None = slots
        if visual_mask is not None:
            tokens = int(visual_mask.sum()) if _values_readable(visual_mask) else None
        check_anchor_rows(anchor, leading, tokens if select is not None else -1)
    weights = _check_weights(weights, hidden, anchor)
    parameters, bias_layers = Head(weights, _check_biases(biases, weights)).pack()
    token_weight = _check_token_weight(token_weight, hidden, select, slots)
    inputs = Inputs(parameters, bias_layers, select, token_weight, slots)
    _check_denominator(denominator, hidden, inputs)
    return inputs


def check_anchor_rows(anchor: Tensor, leading: Sequence[int], tokens: int | None) -> None:
    """Check an anchor that has not the leading shape: then it has a row for each visual token.

    Args:
        tokens: their number; None if it cannot be known here, -1 if every position is one.
    """
    if anchor.dim() == 2 and tokens in (None, anchor.shape[0]):
        return
    count = "N" if tokens is None else tokens
    rows = "" if tokens == -1 else f", or one row for each of the {count} visual tokens"
    raise ValueError(
        f"anchor: expected the leading shape of hidden, {tuple(leading)}{rows}, "
        f"got {tuple(anchor.shape)}"
    )


def is_mask(select: Tensor | None) -> TypeGuard[Tensor]:
    """Whether this selection (`Inputs.select`) is a mask: no index, and not every position."""
    return select is not None and select.dtype == torch.bool


def token_coefficients(
    inputs: Inputs, reduction: str, denominator: float | Tensor | None, like: Tensor
) -> Tensor:
    """(S,): what each slot's loss is multiplied by in the sum that is the reduced loss.

    A weight sum or a denominator of zero gives zeros, so that a batch without visual tokens adds
    exactly 0. Equal coefficients are one expanded number: the tap holds them until backward. The
    dtype is float32, or float64 for float64 `like`. Nothing here waits for the device.
    """
    dtype = stat_dtype(like.dtype)
    select, weight = inputs.select, inputs.token_weight
    mask = select if is_mask(select) else None
    if weight is not None:
        weight = weight.to(dtype) if mask is None else weight.to(dtype) * mask
    total: float | Tensor = 1.0
    if reduction == "mean" and denominator is not None:
        total = denominator
        if isinstance(total, Tensor):  # divided by infinity where it is 0
            total = torch.threshold(total.detach().to(dtype), 0.0, math.inf)
    elif reduction == "mean":
        counted = mask if weight is None else weight
        total = max(inputs.slots, 1)
        if counted is not None:
            total = counted.sum()
            total = torch.where(total > 0, total, torch.ones_like(total))
    if weight is not None:
        return weight / total
    if isinstance(total, int) and total <= EXACT_INT:  # the same bits, in one launch
        return like.new_full((), 1.0 / total, dtype=dtype).expand(inputs.slots)
    return (like.new_ones((), dtype=dtype) / total).expand(inputs.slots)


def _check_tensor(argument: str, value: Any, hidden: Tensor, layer: int | None = None) -> None:
    if type(value) in PLAIN and value.dtype in DTYPES and value.device == hidden.device:
        return
    if layer is not None:
        argument = f"{argument}[{layer}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{argument}: got a DTensor; pass the local tensor (.full_tensor() or .to_local()), or "
            "call the head as a module (PReHead, apply_pre), so that FSDP unshards it first"
        )
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{argument}: expected float16, bfloat16, float32 or float64, got {value.dtype}"
        )
    if value.device != hidden.device:
        raise ValueError(f"{argument}: is on {value.device}, but hidden is on {hidden.device}")


def _is_sequence(value: Any) -> bool:
    if type(value) in (list, tuple):  # a class's registered subclasses take longer to look at
        return True
    return not isinstance(value, Tensor) and isinstance(value, (Sequence, nn.ParameterList))


def _check_selection(mask: Any, index: Any, hidden: Tensor) -> Tensor | None:
    if mask is not None and index is not None:
        raise ValueError("visual_mask and visual_index: expected at most one of them, got both")
    leading = tuple(hidden.shape[:-1])
    positions = math.prod(leading)
    for argument, value, dtype in (
        ("visual_mask", mask, torch.bool),
        ("visual_index", index, torch.int64),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument}: expected a Tensor, got {type(value).__name__}")
        if value.dtype != dtype:
            raise TypeError(f"{argument}: expected dtype {dtype}, got {value.dtype}")
        if value.device != hidden.device:
            raise ValueError(f"{argument}: is on {value.device}, but hidden is on {hidden.device}")
    if mask is not None:
        if tuple(mask.shape) != leading:
            raise ValueError(
                f"visual_mask: expected the leading shape of hidden, {leading}, "
                f"got {tuple(mask.shape)}"
            )
        return mask.reshape(-1)
    if index is not None:
        if index.dim() != 1:
            raise ValueError(f"visual_index: expected shape (N,), got {tuple(index.shape)}")
        if _values_readable(index) and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= positions:
                raise IndexError(
                    f"visual_index: expected values in [0, {positions}), "
                    f"got values from {low} to {high}"
                )
            if index.unique().numel() != index.numel():
                raise ValueError("visual_index: expected unique values, got duplicates")
    return index


def _check_weights(weights: Any, hidden: Tensor, anchor: Tensor) -> list[Tensor]:
    if not _is_sequence(weights):
        raise TypeError(f"weights: expected a sequence of Tensors, got {type(weights).__name__}")
    columns = hidden.shape[-1]
    for layer, weight in enumerate(weights):
        _check_tensor("weights", weight, hidden, layer)
        shape = weight.shape
        if len(shape) != 2 or shape[1] != columns:
            raise ValueError(
                f"weights[{layer}]: expected shape (out_features, {columns}), got {tuple(shape)}"
            )
        columns = shape[0]
    if columns != anchor.shape[-1]:
        what = f"weights[{len(weights) - 1}] gives" if weights else "hidden (no head) has"
        raise ValueError(
            f"anchor: {what} {columns} features, but anchor has {anchor.shape[-1]}: "
            "expected the same number"
        )
    return list(weights)


def _check_biases(biases: Any, weights: list[Tensor]) -> Sequence[Tensor | None]:
    if biases is None:
        return [None] * len(weights)
    if not _is_sequence(biases):
        raise TypeError(f"biases: expected None or a sequence, got {type(biases).__name__}")
    if len(biases) != len(weights):
        raise ValueError(
            f"biases: expected one entry (a Tensor or None) for each of the {len(weights)} "
            f"weights, got {len(biases)}"
        )
    for layer, bias in enumerate(biases):
        if bias is None:
            continue
        _check_tensor("biases", bias, weights[layer], layer)
        expected = weights[layer].shape[:1]
        if bias.shape != expected:
            raise ValueError(
                f"biases[{layer}]: expected shape {tuple(expected)}, got {tuple(bias.shape)}"
            )
    return list(biases)


def _check_token_weight(
    weight: Any, hidden: Tensor, select: Tensor | None, slots: int
) -> Tensor | None:
    """Bring the weights of the leading shape, or of the N visual tokens, to the S slots."""
    if weight is None:
        return None
    _check_tensor("token_weight", weight, hidden)
    weight = weight.detach()
    readable = _values_readable(weight)
    if readable and weight.numel():
        least, dtype = float(weight.min()), stat_dtype(hidden.dtype)
        if not least >= 0:
            raise ValueError(
                f"token_weight: expected non-negative values, got a minimum of {least}"
            )
        if not float(weight.sum(dtype=dtype)) < math.inf:
            raise ValueError(
                f"token_weight: expected values with a finite sum in {dtype}, "
                f"got a maximum of {float(weight.max())}"
            )
    if weight.shape == hidden.shape[:-1]:
        weight = weight.reshape(-1)
        return weight if select is None or is_mask(select) else weight.index_select(0, select)
    count = int(select.sum()) if is_mask(select) and readable else slots
    if weight.dim() != 1 or (weight.shape[0] != count and (readable or not is_mask(select))):
        tokens = "N" if is_mask(select) and not readable else count
        raise ValueError(
            f"token_weight: expected the leading shape of hidden, {tuple(hidden.shape[:-1])}, "
            f"or ({tokens},), one for each visual token; got {tuple(weight.shape)}"
        )
    if is_mask(select):
        return weight.new_zeros(slots).masked_scatter(select, weight)
    return weight


def _check_denominator(denominator: Any, hidden: Tensor, inputs: Inputs) -> None:
    if denominator is None:
        return
    if isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(
                f"denominator: expected a number or a 0-dim Tensor, "
                f"got shape {tuple(denominator.shape)}"
            )
        if denominator.is_complex() or denominator.dtype == torch.bool:
            raise TypeError(f"denominator: expected a real number, got {denominator.dtype}")
        if denominator.device not in (hidden.device, torch.device("cpu")):
            raise ValueError(
                f"denominator: is on {denominator.device}, but hidden is on {hidden.device}"
            )
        if not _values_readable(denominator):
            return
        number = float(denominator)
        # 0 is what a step without visual tokens counts
        if number == 0 and (tokens := _weighted_tokens(inputs)):
            raise ValueError(
                f"denominator: got 0 for a batch of {tokens} visual tokens; expected a positive "
                "number, such as the count of the visual tokens of all micro-batches and ranks of "
                "the step"
            )
        if not 0 <= number < math.inf:
            raise ValueError(f"denominator: expected a positive finite number, got {number}")
        return
    if isinstance(denominator, bool) or not isinstance(denominator, (int, float)):
        raise TypeError(
            f"denominator: expected a number or a 0-dim Tensor, got {type(denominator).__name__}"
        )
    if not 0 < denominator < math.inf:
        raise ValueError(f"denominator: expected a positive finite number, got {denominator}")


def _weighted_tokens(inputs: Inputs) -> int:
    """The visual tokens of a weight above 0; 0 where looking at them would wait for the device."""
    select, weight = inputs.select, inputs.token_weight
    mask = select if is_mask(select) else None
    if not all(_values_readable(x) for x in (mask, weight) if x is not None):
        return 0
    if weight is None:
        return inputs.slots if mask is None else int(mask.sum())
    return int((weight > 0).sum() if mask is None else (mask & (weight > 0)).sum())


def _values_readable(tensor: Tensor) -> bool:
    """Whether looking at values is free: on the CPU, and not in a graph or a transform."""
    return (
        tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_wrapped(tensor)
    )
