# SPDX-License-Identifier: Apache-2.0
"""Watch: reports in the first steps a training that looks healthy, but trains no head."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from prereg_kernels._util import distributed, private
from prereg_kernels.attach.checkpointing import is_in_backward
from prereg_kernels.attach.passes import Pass
from prereg_kernels.attach.state import State

FORGOTTEN = (
    "PRe: the backward pass came from a loss without the term, so the heads do not train. Such a "
    "loss is computed elsewhere than in the model, as TRL's SFTTrainer does. Use the loss that the "
    "model returns; or a trainer with prereg_kernels.trainers.PReTrainerMixin; or set "
    "pre.add_to_loss = False, and after each call of the model add pre.loss to yours; or "
    "apply_pre(model, gradient='tap'), where backward adds the term's gradient by itself, times "
    "pre.loss_scale"
)


UNSCALED = (
    "PRe: a step had several calls whose loss PRe does not know, and to each backward added the "
    "gradient of that call's mean. If your loop divides its loss by their number, as transformers' "
    "Trainer does with label_smoothing_factor, PRe's gradient is too large by that number. Use "
    "prereg_kernels.trainers.PReTrainer; or set pre.loss_scale to the factor of your loss, which "
    "may be 1.0, or pre.denominator; or open pre.collecting() around the calls of one loss"
)


OVER_RANKS = (
    "PRe: to each backward it added the gradient of the call's share of num_items_in_batch. If "
    "your loop counts these over all ranks, and multiplies its loss by their number, as "
    "transformers' Trainer does, PRe's gradient is too small by that number. Use "
    "prereg_kernels.trainers.PReTrainer or PReCallback; or set pre.loss_scale to the factor of "
    "your loss, which may be 1.0, or pre.denominator"
)
EVAL_MODE = (
    "PRe: calls of the model in eval mode, as from_pretrained leaves it, gave the heads no "
    "gradient in three steps of their optimizer, so they do not train; call model.train()"
)


class Watch:
    """Looks at each call before it runs, without a sync, and says each thing once."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._said: set[str] = set()
        self._ddp: Any = None
        self._steps_without_heads: int | None = 0  # None: an optimizer has the heads, or is told
        self._unscaled: deque[set[str]] = deque(maxlen=8)  # `Pass.reached`, since a step
        self._ran_in_eval = False  # with grad, since a step
        self._steps_in_eval = 0  # in turn
        _look_at_steps(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which look for themselves."""
        return vars(self) | {"_ddp": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _look_at_steps(self)

    def training(self) -> None:
        """Look at a training call.

        Raises:
            RuntimeError: the last one's term was lost.
            ValueError: DistributedDataParallel does not know the heads.
        """
        self._look_at_the_last_term()
        self._look_at_ddp()

    def evaluated(self, module: nn.Module, output: Any) -> None:
        """Look at a call in eval mode, whose loss is not meant for training."""
        self._ran_in_eval |= not module.training and torch.is_grad_enabled()
        loss = getattr(output, "loss", None)
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and not output[0].dim():
            loss = output[0]  # without labels the logits come first
        if not module.training and isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(self._train_in_eval_mode)

    def _train_in_eval_mode(self, gradient: Tensor) -> None:
        self._warn(
            "PRe: backward ran through a loss that the model computed in eval mode, as "
            "from_pretrained leaves it, so the heads do not train; call model.train()"
        )

    def bypassed(self, layer: int, module: nn.Module, source: Any) -> None:
        """Look at a layer that runs outside of any call of the model, with this input."""
        # A reentrant checkpoint runs it without grad
        trains = torch.is_grad_enabled() or getattr(source, "requires_grad", False)
        if module.training and trains and not is_in_backward():
            self._warn(
                f"PRe: layer {layer} ran outside of a call of the "
                f"{type(self._state.model).__name__} that PRe is attached to, and such calls train "
                "no head; call the model itself, or the part of it that takes input_ids"
            )

    def gradient(self, tapped: Tensor, current: Pass) -> None:
        """Check, when backward reaches the layer, that it has reached the term before."""
        state = self._state
        is_owed = (
            state.config.gradient == "auto" and current.carry is None and state.collected is None
        )
        # With level="global" the two may come in any order
        raises = is_owed and state.config.level == "patch"
        if tapped.requires_grad and not torch.compiler.is_compiling():
            tapped.register_hook(partial(_reach_layer, current.reached, raises))

    def term(self, term: Tensor, current: Pass) -> None:
        """Note when backward reaches the term. A graph has no hooks, so it notes nothing."""
        if term.requires_grad and not torch.compiler.is_compiling():
            term.register_hook(partial(_reach_term, current.reached))

    def carried(self, current: Pass) -> None:
        """Note a pass to which backward adds the gradient of its mean, whatever its loss is."""
        if torch.compiler.is_compiling():  # a graph notes nothing of what backward reaches
            return
        state = self._state
        if state.loss_scale is not None or current.denominator is not None:
            return
        if current.inputs.get("num_items_in_batch") is None:
            self._unscaled.append(current.reached)
        elif state.item_ranks is None and distributed.ranks() > state.copies:
            self._warn(OVER_RANKS)

    def _look_at_the_last_term(self) -> None:
        last = self._state.last
        if last is None or last.reached != {"layer"} or (last.is_carried and last.is_complete()):
            return
        if self._state.config.gradient == "loss":
            self._warn(FORGOTTEN)
        elif self._state.collected is None:
            self._state.last = None
            raise RuntimeError(FORGOTTEN)

    def _look_at_ddp(self) -> None:
        ddp = private.active_ddp()
        if ddp is None or ddp is self._ddp:
            return
        known = {id(p) for p in private.ddp_parameters(ddp)}
        if any(p.requires_grad and id(p) not in known for p in self._heads()):
            raise ValueError(
                "model: PRe was attached after DistributedDataParallel took the model's "
                "parameters, so the heads' gradients are not averaged over ranks; call "
                "apply_pre(model) before DistributedDataParallel(model)"
            )
        self._ddp = ddp

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at an optimizer that is about to take a step."""
        if not self._state.is_attached:
            return
        in_eval = self._ran_in_eval or self._steps_in_eval
        if self._steps_without_heads is None and not self._unscaled and not in_eval:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        has_heads = any(id(p) in stepped for p in self._heads())
        if has_heads:
            if sum(reached == {"layer"} for reached in self._unscaled) > 1:
                self._warn(UNSCALED)
            self._unscaled.clear()
            self._look_at_eval_mode()
        if self._steps_without_heads is None:
            return
        if has_heads:
            self._steps_without_heads = None
        elif any(id(p) in stepped for p in self._state.model.parameters() if p.requires_grad):
            self._steps_without_heads += 1
            if self._steps_without_heads == 3:
                self._steps_without_heads = None
                self._warn(
                    "PRe: three steps of the model's optimizer left out pre.heads, so they do not "
                    "train. L_PRe falls all the same, as the model adapts to random heads. Call "
                    "apply_pre before you make the optimizer, and see that its parameter groups "
                    "take in 'pre_heads'"
                )

    def _look_at_eval_mode(self) -> None:
        """Without labels there is no loss of the model's to look at, as in `evaluated`."""
        if not self._ran_in_eval and not self._steps_in_eval:
            return
        trains = any(p.grad is not None for p in self._heads())
        self._steps_in_eval = 0 if trains else self._steps_in_eval + self._ran_in_eval
        self._ran_in_eval = False
        if self._steps_in_eval == 3:
            self._warn(EVAL_MODE)

    def _heads(self) -> list[nn.Parameter]:
        return [p for head in self._state.heads.values() for p in head.parameters()]

    def _warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)


def _look_at_steps(watch: Watch) -> None:
    """Look at every optimizer's steps while the watch lives, as no optimizer knows its model."""
    reference = weakref.ref(watch)

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        watch = reference()
        if watch is not None:
            watch.step(optimizer)

    weakref.finalize(watch, register_optimizer_step_pre_hook(look).remove)


def _reach_term(reached: set[str], gradient: Tensor) -> None:
    reached.add("term")


def _reach_layer(reached: set[str], raises: bool, gradient: Tensor) -> None:
    reached.add("layer")
    is_lost = "term" not in reached
    # A graph that is kept may get the term's gradient by another backward pass
    if raises and is_lost and not private.keeps_graph():
        raise RuntimeError(FORGOTTEN)
