# SPDX-License-Identifier: Apache-2.0
"""Taps: what the hooks of the regularised layers do.

A layer's output goes through the head's tap. With level="global" its images' means are kept for
the end of the pass instead. Gradient checkpointing runs a layer again in backward. Then the tap
brings back what it had saved, or, after a first run without grad, does what that run could not.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels._util import private
from prereg_kernels._util.fsdp import check_shared
from prereg_kernels.attach.anchors import llm_width
from prereg_kernels.attach.checkpointing import (
    is_called_within_checkpoint,
    outside_checkpoint,
    outside_selection,
)
from prereg_kernels.attach.identity import carry_along, use
from prereg_kernels.attach.image_spans import Images
from prereg_kernels.attach.passes import Calls, Pass, zeros
from prereg_kernels.attach.pooling import pool_images
from prereg_kernels.attach.reentrant import SecondRun, SecondRuns, add_gradient, source_of
from prereg_kernels.attach.sequence_parallel import WHOLE_ROWS, Part
from prereg_kernels.attach.state import State
from prereg_kernels.attach.watch import FORGOTTEN, Watch


class Taps:
    """The taps of a model."""

    def __init__(self, state: State, calls: Calls, watch: Watch) -> None:
        self._state, self._calls, self._watch = state, calls, watch
        self._width = llm_width(state.family.embeddings_of(state.model))
        self._second_runs = SecondRuns()

    def see(
        self, layer: int, is_next_input: bool, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        """A layer's hook, outside of torch.compile's graphs where one cannot hold it."""
        if self._ends_graph(module):
            see = torch.compiler.disable(self._see)
            return see(layer, is_next_input, module, args, output)
        return self._see(layer, is_next_input, module, args, output)

    def _ends_graph(self, module: nn.Module) -> bool:
        """Whether torch.compile is to leave the hook out of its graphs.

        A graph does not tell a checkpointed layer's run in backward from the first. And a hook
        that no graph holds is not to be compiled function by function: what those do to autograd's
        stacks, and ask of weak references, goes wrong.
        """
        if not torch.compiler.is_compiling():
            return private.compiles_frames()
        if is_called_within_checkpoint(module):
            return True
        call = self._calls.current
        is_first = call is not None and call.current is not None and call.current.training
        is_second = call is None and module.training
        return is_second if torch.is_grad_enabled() else is_first

    def _see(
        self, layer: int, is_next_input: bool, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        hidden = self._state.family.states_of(output, self._width)
        compiled, call = torch.compiler.is_compiling(), self._calls.current
        current = None if call is None else call.current
        if not compiled and call is None:
            self._watch.bypassed(layer, module, args[0] if args else None)
        # The next layer's checkpoint holds its input, this output: saved beside it, it is held
        # once, and this layer's recomputation need not go to its end to bring it back.
        is_held = is_next_input and is_called_within_checkpoint(module)
        is_patch = self._state.config.level == "patch"
        with (
            outside_checkpoint() if is_held and is_patch else nullcontext(),
            nullcontext() if compiled else outside_selection(),
        ):
            if current is not None:
                self._check(layer, current, hidden)
                if current.training and not torch.is_grad_enabled():
                    self._run_first(layer, current, hidden, args)
                    return None
                tapped = self._tap(layer, current, hidden)
            else:
                tapped = None if compiled else self._run_again(layer, args, hidden)
        if tapped is not None and current is not None:
            self._watch.gradient(tapped, current)
        if tapped is not None and hidden is not whole:  # one stream of several
            tapped = carry_along(whole, tapped)
        if tapped is None or not isinstance(output, tuple):
            return tapped
        return (tapped, *output[1:])

    def _check(self, layer: int, current: Pass, hidden: Tensor) -> None:
        if current.anchor is None:
            raise RuntimeError(
                f"PRe: layer {layer} runs, but the language model, "
                f"{self._state.family.language_model!r}, has not been called with inputs_embeds; "
                "expected family.language_model to be the module that gets them"
            )
        expected = (*current.own_shape, self._width)
        if hidden.shape != expected:
            is_part = hidden.dim() == 3 and hidden.shape[1] < expected[1]
            if is_part and hidden.shape == (expected[0], hidden.shape[1], self._width):
                raise ValueError(
                    f"{current.source}: PRe finds the visual tokens by it, of the shape "
                    f"{tuple(current.shape)}, and layer {layer} returns {tuple(hidden.shape)}. "
                    f"{WHOLE_ROWS}"
                )
            raise ValueError(
                f"family.streams: layer {layer}, a "
                f"{type(self._state.family.layers_of(self._state.model)[layer - 1]).__name__}, "
                f"returns {tuple(hidden.shape)}; expected (rows, length, D), "
                f"{expected}. Of several residual streams, say which PRe "
                "reads: family=Family(..., streams=function), from that output and D"
            )

    def _tap(self, layer: int, current: Pass, hidden: Tensor) -> Tensor | None:
        """The states that the next layers get; None: as they are."""
        if self._state.config.level == "patch":
            return self.loss(layer, current, hidden, _index(current, hidden))
        with torch.set_grad_enabled(current.training):  # small, and outside of what is checkpointed
            current.pooled[layer] = self._means(current, hidden)
        return use(hidden, *self._state.module_of(layer).parameters()) if current.training else None

    def _means(self, current: Pass, hidden: Tensor) -> Tensor:
        assert current.images is not None
        return self._pool(current.images, current.part, current.index, hidden)

    def _pool(self, images: Images, part: Part | None, index: Tensor, hidden: Tensor) -> Tensor:
        """The means of the images' tokens, those on other ranks included: (images, D)."""
        of_token, group = images.of_token, None
        if part is not None:
            of_token, index, group = of_token[part.place], part.index, self._state.sequence_group
        of_token, index = of_token.to(hidden.device), index.to(hidden.device)
        return pool_images(hidden, of_token, images.count, index=index, group=group)

    def _run_again(self, layer: int, args: tuple[Any, ...], hidden: Tensor) -> Tensor | None:
        """A checkpointed layer in backward."""
        if not torch.is_grad_enabled():
            return None
        run = self._second_runs.find(layer, args[0] if args else None, hidden)
        if run is not None:
            return run.run(hidden)
        if self._state.config.level == "global":  # nothing is saved in it
            return None
        # Bring back the tap's saved tensors, and nothing else; the first run has counted the loss.
        nothing = hidden.new_zeros(0, dtype=torch.long)
        anchor = hidden.new_zeros(0, self._state.anchor_features)
        head = self._state.module_of(layer)
        tapped: Tensor = head(hidden, anchor, tap=True, visual_index=nothing)[0]
        return tapped

    def _run_first(self, layer: int, current: Pass, hidden: Tensor, args: tuple[Any, ...]) -> None:
        """A layer without grad, of a step that trains: it leaves to the second run what is to do.

        Raises:
            RuntimeError: there will be none.
            ValueError: FSDP would make wrong gradients of the head.
        """
        state, config = self._state, self._state.config
        source = source_of(args, layer)
        is_owed = config.gradient == "auto" and current.carry is None and state.collected is None
        missing = FORGOTTEN if is_owed else None
        if config.level == "global":
            assert current.images is not None
            pool = partial(self._pool, current.images, current.part, current.index)

            def differentiate(hidden: Tensor, gradient: Any) -> Tensor:
                return add_gradient(hidden, pool(hidden), gradient)

            run = SecondRun(
                layer, source, hidden.shape, differentiate, current.reached, missing=missing
            )
            current.pooled[layer] = self._second_runs.leave(run, pool(hidden))
            return
        if config.share_head and len(state.heads) > 1:
            check_shared(state.module_of(layer))
        anchor, options = self._arguments(layer, current, hidden, _index(current, hidden))
        value = current.values[layer]

        def tap(hidden: Tensor, gradient: Any) -> Tensor:
            tapped: Tensor = state.module_of(layer)(
                hidden, anchor, tap=True, value_out=value, carry=gradient, carry_always=True,
                probe=current.probes.get(layer), **options, **state.groups_of_heads(),
            )[0]  # fmt: skip
            return tapped

        run = SecondRun(
            layer, source, hidden.shape, tap, current.reached, otherwise=current.carry,
            always=current.carry is not None and config.gradient == "tap", missing=missing,
        )  # fmt: skip
        if config.value_in_forward:
            value.copy_(self._value(layer, hidden, anchor, options))
        left = self._second_runs.leave(run, value)
        current.losses[layer] = left
        current.left.append(left)

    def _arguments(
        self, layer: int, current: Pass, hidden: Tensor, index: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The anchor, and the options of the head's call; the value gets a place by `hidden`."""
        config = self._state.config
        assert current.anchor is not None
        if current.values[layer].device != hidden.device:  # a model on several devices
            current.values |= zeros((layer,), hidden.device)
        denominator = current.denominator if current.training else None
        if isinstance(denominator, Tensor):
            denominator = denominator.to(hidden.device)
        if denominator is not None and current.chosen is not None:
            # the sum over the chosen, each in place of so many (prereg_kernels.attach.sampling)
            denominator = denominator * (current.chosen.numel() / current.own_index.numel())
        is_mask = index is not None and index.dtype == torch.bool
        return current.anchor.to(hidden.device), {
            "loss": config.loss,
            "normalize": config.normalize,
            "denominator": denominator,
            "visual_mask" if is_mask else "visual_index": index,
        }

    def _value(self, layer: int, hidden: Tensor, anchor: Tensor, options: dict[str, Any]) -> Tensor:
        """The layer's loss without a gradient; ranks with the same states share the work."""
        head, ranks = self._state.module_of(layer), self._state.groups_of_heads()
        if ranks.get("group") is None or not ranks.get("same_hidden", True):
            value: Tensor = head(hidden, anchor, **options)
        else:
            _, value = head(hidden, anchor, tap=True, compute_value=True, **options, **ranks)
        return value

    def loss(
        self, layer: int, current: Pass, hidden: Tensor, index: Tensor | None
    ) -> Tensor | None:
        """The layer's loss, into `current`; in training, returns the tapped `hidden`."""
        head, config = self._state.module_of(layer), self._state.config
        anchor, options = self._arguments(layer, current, hidden, index)
        value = current.values[layer]
        if not current.training:
            with torch.no_grad():
                value.copy_(self._value(layer, hidden, anchor, options))
            return None
        tapped, current.losses[layer] = head(
            hidden,
            anchor,
            tap=True,
            compute_value=config.value_in_forward,
            value_out=None if config.value_in_forward else value,  # it is written below
            carry=current.carry,
            carry_always=current.carry is not None and config.gradient == "tap",
            probe=None if torch.compiler.is_compiling() else current.probes.get(layer),
            **options,
            **self._state.groups_of_heads(),
        )
        if config.value_in_forward:
            value.copy_(current.losses[layer].detach())
        return tapped


def _index(current: Pass, hidden: Tensor) -> Tensor:
    """The index of the tokens that L_PRe reads."""
    index = current.own_index if current.chosen is None else current.own_index[current.chosen]
    return index.to(hidden.device)
