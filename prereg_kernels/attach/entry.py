"""What enters the decoder: a sequence with visual features in it, which are the anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from prereg_kernels.attach.anchors import function_rows, projector_rows
from prereg_kernels.attach.first_steps import FirstSteps
from prereg_kernels.attach.passes import Calls, Pass
from prereg_kernels.attach.pooling import pool_images
from prereg_kernels.attach.state import State


class Entry:
    """Takes the anchor of a pass from it.

    Attributes:
        calls: those that the model is in. first_steps: which look at what enters.
    """

    def __init__(self, state: State, calls: Calls) -> None:
        self._state, self.calls = state, calls
        self.first_steps = FirstSteps(state)
        self._saw_finite_anchor = False

    def take(self, current: Pass, states: Tensor, is_input: bool) -> None:
        """The decoder gets these, with the visual features in them."""
        with torch.no_grad():
            states = states.detach()
            self.first_steps.look(current, states, is_input)
            current.anchor = self._anchor(current, states)

    def _anchor(self, current: Pass, embeddings: Tensor) -> Tensor:
        """For each row that L_PRe reads, or, for what entered the LLM, of the whole batch."""
        state, source, images = self._state, self._state.config.anchor, current.images
        tokens, width = current.index.numel(), state.anchor_features
        count = None if images is None else images.count
        if source == "pre_llm":
            if images is None:
                return embeddings
            return pool_images(embeddings, images.of_token, images.count, index=current.index)
        if callable(source):
            self.calls.enter(None)  # the function may call parts of the model
            try:
                rows = source(current.inputs)
            finally:
                self.calls.leave(None)
            rows = function_rows(
                rows, tokens, count, width, current.index.device,
                finite=not self._saw_finite_anchor, shown=current.shown,
            )  # fmt: skip
            self._saw_finite_anchor |= tokens > 0
        else:
            rows = projector_rows(
                current.encoded, tokens, width, state.family, embeddings, current.shown,
                kinds=current.kinds,
            )  # fmt: skip
            current.encoded.clear()
        if images is not None:
            is_pooled = rows.shape[0] == images.count
            return rows if is_pooled else pool_images(rows, images.of_token, images.count)
        return rows if current.chosen is None else rows[current.chosen.to(rows.device)]


def check_sequence(current: Pass, states: Tensor) -> None:
    """Raise ValueError unless the decoder's sequence is the one that is marked."""
    if states.shape[:-1] != current.shape:
        raise ValueError(
            f"{current.source}: PRe finds the visual tokens by it; expected the decoder's "
            f"sequence to have its shape, {tuple(current.shape)}, got inputs_embeds of "
            f"{tuple(states.shape[:-1])}. Where the model expands or splits its sequence, "
            "train it with an id for each position, or set pre.next_visual_mask before each "
            "call to a mask of the sequence that the decoder gets, or pass "
            "family=Family(..., visual_mask=function) that makes it from the call's arguments"
        )
