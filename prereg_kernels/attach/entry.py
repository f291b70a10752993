# SPDX-License-Identifier: Apache-2.0
"""Entry: takes the anchor from what enters the decoder, a sequence with visual features in it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels.attach.anchors import function_rows, llm_width, projector_rows
from prereg_kernels.attach.checkpointing import outside_selection
from prereg_kernels.attach.first_steps import SEVERAL_ROWS, WHAT_TO_DO, FirstSteps
from prereg_kernels.attach.forward import parameters_of
from prereg_kernels.attach.passes import Calls, Pass
from prereg_kernels.attach.pooling import pool_images
from prereg_kernels.attach.sequence_parallel import WHOLE_ROWS
from prereg_kernels.attach.state import State

PIXELS = ("pixel_values", "pixel_values_videos")


class Entry:
    """Takes the anchor of a pass from what enters the decoder.

    Attributes:
        calls: those that the model is in. first_steps: which look at what enters.
    """

    def __init__(self, state: State, calls: Calls) -> None:
        self._state, self.calls = state, calls
        self.first_steps = FirstSteps(state)
        self._saw_finite_anchor = False
        self._enters_at = state.family.entry_of(state.model)
        self._width, self._is_watching = llm_width(state.family.embeddings_of(state.model)), False

    def see(self, current: Pass, embeddings: Tensor | None) -> None:
        """A hook: the language model is called with these `inputs_embeds`."""
        if embeddings is not None:
            check_sequence(current, embeddings)
        if self._enters_at is not None:
            if embeddings is not None:
                self.first_steps.look_before(current, embeddings, True)
        elif embeddings is not None:
            self.take(current, embeddings, True)
        elif not torch.compiler.is_compiling():
            self._find_first_layer(current)

    def _find_first_layer(self, current: Pass) -> None:
        """Watch the first layer, for a language model that is called without `inputs_embeds`.

        Such a model merges the features itself, or the batch has none.

        Raises:
            ValueError: a module in it is nearer to the layers and takes them.
        """
        family, model = self._state.family, self._state.model
        assert family.layers is not None  # the resolver has found it
        holder = family.layers.rpartition(".")[0]
        takes_them = "inputs_embeds" in parameters_of(model.get_submodule(holder))
        if takes_them and holder != family.language_model and len(current.index):
            raise ValueError(
                "family.language_model: expected the module that is called with inputs_embeds; "
                f"{family.language_model!r} is called without, and {holder!r} in it, which holds "
                "the decoder layers, takes them"
            )
        if not self._is_watching:
            self.watch(0)  # of passes without `inputs_embeds` alone

    def watch(self, entry: int) -> None:
        """The decoder layer that is the first to see the visual features, and the first of all."""
        self._is_watching = True
        layers = self._state.family.layers_of(self._state.model)
        for number in {0, entry}:
            see = self.see_entry if number == entry else self.see_first_layer
            hook = layers[number].register_forward_pre_hook(see, with_kwargs=True)
            self._state.hooks.append(hook)

    def see_first_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before the one that is the first to see the visual features."""
        current = self._current
        if current is not None and current.embedded is not None:
            self.first_steps.look_before(current, self._states(args, kwargs), False)

    def see_entry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first layer that sees the visual features."""
        current = self._current
        if current is None or current.anchor is not None:
            return
        states = self._states(args, kwargs)
        check_sequence(current, states)
        self.take(current, states, not self._enters_at)

    @property
    def _current(self) -> Pass | None:
        call = self.calls.current
        return None if call is None else call.current

    def _states(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden states among a layer's arguments, (rows, length, D)."""
        states = args[0] if args else kwargs["hidden_states"]
        return self._state.family.states_of(states, self._width)

    def take(self, current: Pass, states: Tensor, is_input: bool) -> None:
        """Take the anchor from the states that enter the decoder, with visual features in them."""
        compiled = torch.compiler.is_compiling()
        with torch.no_grad(), nullcontext() if compiled else outside_selection():
            states = states.detach()
            if not compiled:
                self.first_steps.look(current, states, is_input)
            if current.part is not None and states.shape[:-1] != current.part.shape:
                states = current.part.own(states)
            current.anchor = self._anchor(current, states)

    def _anchor(self, current: Pass, embeddings: Tensor) -> Tensor:
        """The anchor of each row that L_PRe reads; for "pre_llm", of the whole batch."""
        state, source, images = self._state, self._state.config.anchor, current.images
        tokens, width = current.index.numel(), state.anchor_features
        count = None if images is None else images.count
        if current.is_idle:
            return embeddings.new_zeros(0, width)
        if source == "pre_llm":
            if images is None:
                return embeddings
            group = None if current.part is None else state.sequence_group
            of_token, index = current.own(images.of_token), current.own_index
            return pool_images(embeddings, of_token, images.count, index=index, group=group)
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
            family, model = state.family, state.model
            rows = projector_rows(
                current.encoded, tokens, width, family, embeddings, current.shown,
                kinds=lambda: current.kinds(family.visual_token_ids(model)),
                has_both=all(current.inputs.get(name) is not None for name in PIXELS),
                is_listed=state.origin == "listed",
                places=family.places and partial(family.places, model.config, current.inputs),
            )  # fmt: skip
            current.encoded.clear()
        if images is not None:
            is_pooled = rows.shape[0] == images.count
            return rows if is_pooled else pool_images(rows, images.of_token, images.count)
        rows = current.own(rows)
        return rows if current.chosen is None else rows[current.chosen.to(rows.device)]


def check_sequence(current: Pass, states: Tensor) -> None:
    """Raise ValueError unless the decoder's sequence is the one that is marked."""
    if states.shape[:-1] not in (current.shape, current.own_shape):
        is_longer = current.source == "input_ids" and states.shape[1] > current.shape[1]
        if current.part is not None:
            raise ValueError(
                f"pre.sequence_parallel: expected the decoder's sequence to have this rank's part "
                f"of {tuple(current.shape)}, {tuple(current.own_shape)}, or the shape of all of "
                f"it, got inputs_embeds of {tuple(states.shape[:-1])}"
            )
        if states.shape[0] == current.shape[0] and states.shape[1] < current.shape[1]:
            what_to_do = f"{WHOLE_ROWS}. Or else: {WHAT_TO_DO}"
        else:
            what_to_do = f"{f'{SEVERAL_ROWS}. ' * is_longer}{WHAT_TO_DO}"
        raise ValueError(
            f"{current.source}: PRe finds the visual tokens by it; expected the decoder's "
            f"sequence to have its shape, {tuple(current.shape)}, got inputs_embeds of "
            f"{tuple(states.shape[:-1])}. {what_to_do}"
        )
