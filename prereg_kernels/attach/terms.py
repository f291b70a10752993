# SPDX-License-Identifier: Apache-2.0
"""The term of a forward pass: its weight in the step, and how it reaches a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.attach.identity import carry_along
from prereg_kernels.attach.passes import Pass, Record
from prereg_kernels.attach.state import State


def label_share(current: Pass) -> float | Tensor:
    """This micro-batch's share of the step's label tokens; 0 where the step has none.

    Where the caller gives the step's count (transformers' Trainer does under gradient
    accumulation, and then does not divide the loss), L_LM is a share of the step's mean: so
    must L_PRe be. `denominator` makes this exact, and the share is then not needed.
    """
    items, labels = current.inputs.get("num_items_in_batch"), current.labels
    if items is None or labels is None or current.denominator is not None:
        return 1.0
    return labels / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1))


def carry_of(state: State, current: Pass) -> float | Tensor | None:
    """The gradient of a layer's loss, if no loss of the caller's holds it. None: one has to.

    Raises:
        ValueError: the gradient depends on the step's labels, which the call does not show.
    """
    inputs, gradient = current.inputs, state.config.gradient
    has_labels = inputs.get("labels") is not None
    if state.collected is not None or gradient == "loss" or (gradient == "auto" and has_labels):
        return None
    items = inputs.get("num_items_in_batch")
    if items is not None and not has_labels and state.denominator is None:
        raise ValueError(
            "labels: the call has num_items_in_batch without them, so PRe cannot tell its share "
            "of the step; expected both, or pre.denominator, or a trainer with "
            "prereg_kernels.trainers.PReTrainerMixin"
        )
    scale = state.loss_scale
    if scale is None:  # of a share of all ranks' labels, the ranks' average is not the sum
        is_share = items is not None and current.denominator is None
        scale = (state.item_ranks or 1.0) if is_share else 1.0
    return scale * (state.weight / len(state.heads)) * label_share(current)


def record_of(current: Pass, output: Any) -> Record:
    """The record of a pass, which the handle keeps."""
    tokens, labels = current.tokens, current.labels
    rows = tokens
    if current.images is not None:
        mine = current.image_rows
        count = current.images.count if mine is None else mine.stop - mine.start
        rows = torch.full_like(tokens, count)
    if current.is_idle:
        rows = torch.zeros_like(tokens)
    fraction = 1.0
    if current.chosen is not None and current.own_index.numel() and not current.is_idle:
        fraction = current.chosen.numel() / current.own_index.numel()
    lm_loss = None
    if labels is not None:
        lm_loss = _loss_of(output)
    if lm_loss is None or labels is None:
        mean = labels = torch.zeros_like(tokens)
    else:
        mean = lm_loss.detach().clone()
        items = current.inputs.get("num_items_in_batch")
        if items is not None:  # it is this call's share of the step's mean
            mean = mean * items / labels.clamp(min=1)
    return Record(
        current.training,
        current.carry is not None,
        tokens,
        rows,
        current.denominator,
        mean,
        labels,
        current.values,
        current.reached,
        current.probes,
        fraction,
        current.is_idle,
    )


def add_to_loss(output: Any, term: Tensor) -> Any:
    """The model's output, with the term added to its loss. TypeError if it has no loss."""
    if isinstance(output, tuple):
        return (output[0] + term.to(output[0].device), *output[1:])
    loss = _loss_of(output)
    if not isinstance(loss, Tensor):
        raise TypeError(
            "model: expected an output with a loss, as it got labels: one of transformers', a dict "
            f"with 'loss', or a tuple that begins with it; got {type(output).__name__} without"
        )
    total = loss + term.to(loss.device)
    if hasattr(output, "loss"):
        output.loss = total
        return output
    return {**output, "loss": total}


def _loss_of(output: Any) -> Any:
    """The loss of a model's output, which is a plain dict in some code outside of transformers."""
    if isinstance(output, tuple):
        return output[0]
    return output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)


def carry_in(output: Any, tapped: Sequence[Tensor]) -> Any:
    """The model's output, from any part of which the graph reaches the taps."""
    if not tapped:
        return output

    def carry(x: Any) -> Any:
        is_differentiable = isinstance(x, Tensor) and x.is_floating_point()
        return carry_along(x, *tapped) if is_differentiable else x

    if isinstance(output, tuple):
        return tuple(map(carry, output))
    for name in ("loss", "logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            output[name] = carry(output[name])
    states = getattr(output, "hidden_states", None)
    if states:
        output["hidden_states"] = (*states[:-1], carry(states[-1]))
    return output
