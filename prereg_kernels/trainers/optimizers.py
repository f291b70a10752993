# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a Trainer whose model has PRe. It has the heads, at their rate and decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from prereg_kernels._util import distributed
from prereg_kernels.attach.handle import find_pre, state_of
from prereg_kernels.attach.parameter_groups import are_as_set, has_own, take_heads
from prereg_kernels.attach.state import HEADS, State

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class Optimizers(_Base):
    """The part of PReTrainerMixin that makes and checks the optimizer."""

    _is_optimizer_own = False  # made here, not given by the caller

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's method; the heads get groups if they have a rate or decay of their own.

        Raises:
            ValueError: they have, and a given optimizer has another one for them, or none.
        """
        is_given = self.optimizer is not None and not self._is_optimizer_own
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        state = state_of(find_pre(self.model))
        if has_own(state.config) and (is_given or is_new):
            set_heads_apart(optimizer, state, is_given)
        self._is_optimizer_own = not is_given
        if self.is_deepspeed_enabled:  # whose engine puts tensors of its own in it
            check_optimizer(optimizer, self.model)
        return optimizer


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raise ValueError if the optimizer has parameters of the model, but not its heads."""
    groups = getattr(optimizer, "param_groups", None) or ()
    held = {id(p) for group in groups for p in group["params"]}
    heads = state_of(find_pre(model)).parameters().items()
    missing = [n for n, p in heads if p.requires_grad and id(p) not in held]
    # Without any, it is of tensors made from them, or takes the model itself, as LOMO does.
    if missing and any(id(p) in held for p in model.parameters()):
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__  # of Accelerate's
        if len(missing) < sum(p.requires_grad for _, p in heads):
            raise ValueError(
                f"optimizer: expected all of PRe's heads in its param_groups, and {kind} lacks "
                f"{', '.join(f'{HEADS}.{name}' for name in missing)}, as one of matrices alone, "
                "such as Muon, leaves out biases; give them a group, or take another optimizer"
            )
        raise ValueError(
            f"optimizer: expected PRe's heads in its param_groups, got none with "
            f"{', '.join(f'{HEADS}.{name}' for name in missing)}; they would never move, and "
            "L_PRe would fall all the same. Make the optimizer after apply_pre, of all "
            "parameters that require grad; one that groups them by name needs a group for "
            f"{HEADS!r}"
        )


def set_heads_apart(optimizer: Any, state: State, is_given: bool) -> None:
    """Give the heads groups of their own; raise ValueError if a given optimizer has none."""
    groups = getattr(optimizer, "param_groups", None) or []
    if is_given and groups and are_as_set(groups, state):
        return
    apart = [] if is_given else take_heads(groups, state)
    if not apart:
        config = state.config
        raise ValueError(
            f"optimizer: expected the heads in groups with head_learning_rate="
            f"{config.head_learning_rate} and head_weight_decay={config.head_weight_decay}, which "
            f"this {type(optimizer).__name__} has not; make it of pre.parameter_groups(...), or "
            "have a trainer of with_pre make it"
        )
    for group in apart:
        optimizer.add_param_group(group)


class HeadNorm(TrainerCallback):
    """The norm of the heads' gradient in the last step, on the device until it is logged."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._norm: Tensor | None = None  # as the optimizer gets it, clipped

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Measure the norm if gradients are whole: DeepSpeed and FSDP1 leave parts on each rank."""
        trainer = self._trainer
        heads = state_of(find_pre(trainer.model)).parameters().values()
        gradients = [p.grad for p in heads if p.grad is not None]
        is_whole = not trainer.is_fsdp_enabled or all(map(distributed.is_sharded, gradients))
        self._norm = None
        if gradients and is_whole and not trainer.is_deepspeed_enabled:
            self._norm = torch.nn.utils.get_total_norm(gradients)

    def take(self, logs: dict[str, float]) -> Tensor:
        """The norm before clipping, as "grad_norm" in the logs: (1,), NaN if it is not known."""
        norm, total = self._norm, logs.get("grad_norm")
        self._norm = None
        limit = self._trainer.args.max_grad_norm
        if norm is None:
            return torch.full((1,), math.nan)
        if not limit:  # nothing is clipped, and 4.57 logs no norm
            return distributed.whole(norm)[None]
        if total is None:
            return torch.full((1,), math.nan)
        return distributed.whole(norm)[None] / min(1.0, limit / (total + 1e-6))
