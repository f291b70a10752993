# SPDX-License-Identifier: Apache-2.0
"""Reentrant checkpointing: layers that run without grad first, and again with grad in backward.

`torch.utils.checkpoint` with use_reentrant=True runs a layer under no_grad and keeps its input. In
backward it runs the layer again with grad, and differentiates it by itself. DeepSpeed and Unsloth
have checkpoints of their own that do the same.

The first run has no graph that could hold the layer's loss. So the loss is a leaf. It is made last,
so backward comes to it first, and it keeps the gradient that arrives. The tap of the second run
scales the term's gradient by that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prereg_kernels._util import private
from prereg_kernels.attach.checkpointing import is_in_backward

Gradient = Tensor | float


@dataclass(eq=False)
class SecondRun:
    """What the second run of a layer needs to know of its first.

    Attributes:
        layer: its number. source: its input, by which the second run finds this.
        shape: of its states.
        tap: from the states of the second run and the gradient of what the first one left, to the
            states that add PRe's gradient.
        gradient: of what the first run left: of the layer's loss, or of the means of its images.
        otherwise: the gradient where no loss holds the term.
        always: that one counts, whatever a loss holds.
        missing: what to raise where backward brings neither. None: nothing is added.
        reached: as `Record.reached`. has_run: since backward came to what the first run left.
    """

    layer: int
    source: weakref.ref[Tensor] | None
    shape: torch.Size
    tap: Callable[[Tensor, Gradient], Tensor]
    reached: set[str]
    gradient: Gradient | None = None
    otherwise: Gradient | None = None
    always: bool = False
    missing: str | None = None
    has_run: bool = False

    def run(self, hidden: Tensor) -> Tensor | None:
        """The states of the second run, tapped; None: there is nothing to add."""
        came, self.gradient, self.has_run = self.gradient, None, True
        gradient = self.otherwise if self.always or came is None else came
        is_kept, tap = private.keeps_graph(), self.tap
        if not is_kept:  # the batch's embeddings, among others
            self.tap = _nothing
        self.reached.add("layer")
        # A graph that is kept may get the term's gradient by another backward pass.
        is_one_of_several = is_kept and came is None and not self.always
        if gradient is None or is_one_of_several:
            if self.missing is not None and not is_kept:
                raise RuntimeError(self.missing)
            return None
        return tap(hidden, gradient)

    def bring(self, gradient: Tensor | None) -> None:
        """Backward has come to what the first run left."""
        self.gradient, self.has_run = gradient, False
        if not private.keeps_graph():
            private.after_backward(self._check)

    def _check(self) -> None:
        """Raise RuntimeError unless the backward pass has run the layer again."""
        if not self.has_run:
            raise RuntimeError(
                f"PRe: layer {self.layer} ran without grad, as with use_reentrant=True, and the "
                "backward pass that came to its loss has not run it again, so PRe's gradient is "
                "lost; differentiate pre.loss together with a loss of the model's output, or use "
                "use_reentrant=False; or the layer is under torch.no_grad()"
            )


class SecondRuns:
    """The second runs to come. The graph of what a first run left owns them; they end with it."""

    def __init__(self) -> None:
        self._waiting: list[weakref.ref[SecondRun]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which take over no second run."""
        return vars(SecondRuns())

    def leave(self, run: SecondRun, value: Tensor) -> Tensor:
        """`value`, whose gradient the second run gets."""
        self._waiting = [each for each in self._waiting if each() is not None]
        self._waiting.append(weakref.ref(run))
        with torch.enable_grad():
            leaf = value.new_zeros((), requires_grad=True)
            left: Tensor = _Leave.apply(run, value, leaf)
        return left

    def find(self, layer: int, source: Any, hidden: Tensor) -> SecondRun | None:
        """The first run of what runs now, if it runs again so.

        Raises:
            RuntimeError: it is one of several, and none has this input.
        """
        if not self._waiting or not is_in_backward() or _is_recorded():
            return None
        runs = [run for each in self._waiting if (run := each()) is not None]
        runs = [run for run in runs if run.layer == layer and run.shape == hidden.shape]
        same = [run for run in runs if _is_same(run.source, source)]
        # What was offloaded comes back elsewhere. The last pass's backward runs first.
        found = same[-1:] or [run for run in runs if run.source is None or run.source() is None]
        if len(found) > 1:
            raise RuntimeError(
                f"PRe: layer {layer} runs again in backward, after {len(found)} forward passes, "
                "and its input is none of theirs, as where a checkpoint offloads it; expected a "
                "backward pass after each forward pass, or use_reentrant=False"
            )
        if found and not private.keeps_graph():
            self._waiting = [each for each in self._waiting if each() is not found[0]]
        return found[0] if found else None


def _nothing(hidden: Tensor, gradient: Gradient) -> Tensor:
    raise AssertionError("the graph of this run is gone")


def add_gradient(hidden: Tensor, pooled: Tensor, gradient: Tensor) -> Tensor:
    """`hidden`, whose backward also differentiates `pooled` by this gradient."""
    tapped: Tensor = _Add.apply(hidden, pooled, gradient)
    return tapped


def source_of(args: tuple[Any, ...], layer: int) -> weakref.ref[Tensor] | None:
    """The states among a layer's arguments, by which the second run is found.

    Raises:
        RuntimeError: they need no gradient, and so the layer will not run again.
    """
    states = args[0] if args and isinstance(args[0], Tensor) else None
    if states is not None and not states.requires_grad:
        raise RuntimeError(
            f"PRe: layer {layer} runs without grad, as with use_reentrant=True, and its input "
            "needs no gradient, so backward does not run it again, and its head would not train; "
            "call model.enable_input_require_grads(), or use use_reentrant=False"
        )
    return None if states is None else weakref.ref(states)


def _is_same(source: weakref.ref[Tensor] | None, states: Any) -> bool:
    """Whether both are the same tensor, by memory: a checkpoint detaches what it is given."""
    known = None if source is None else source()
    if known is None or not isinstance(states, Tensor):
        return False
    if (known.dtype, known.device) != (states.dtype, states.device):
        return False
    return known.is_set_to(states)


def _is_recorded() -> bool:
    """Whether a non-reentrant checkpoint runs this again, for what its first run has saved."""
    hooks = private.top_saved_tensors_hooks()
    return hooks is not None and hooks[0].__module__ == private.CHECKPOINT


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: SecondRun, value: Tensor, leaf: Tensor) -> Tensor:
        ctx.run = run
        ctx.set_materialize_grads(False)  # none is not a gradient of zeros
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:
        ctx.run.bring(gradient)
        return None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, pooled: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor, None]:
        return gradient, ctx.gradient, None
