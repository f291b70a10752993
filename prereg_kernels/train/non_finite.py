# SPDX-License-Identifier: Apache-2.0
"""Steps whose loss or gradient is NaN or infinite: their batch is named, and they stop the run or
are left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from prereg_kernels._util.distributed import whole
from prereg_kernels._util.files import printable
from prereg_kernels.train.config import NON_FINITE
from prereg_kernels.train.facts import Facts
from prereg_kernels.train.records import Metrics

_NAMED = 8
"""Samples that a message names; the file has all."""


class NonFiniteError(ValueError):
    """A loss or a gradient is not finite, and the settings say that the run stops."""


class _Step(NamedTuple):
    step: int
    where: list[tuple[str, ...]]  # of each micro-batch of this rank
    flags: Tensor  # (2,): whether one of its losses is bad, and the gradient
    losses: Tensor  # bool, of each micro-batch


class NonFinite(TrainerCallback):
    """Looks at each step of a run, on all ranks alike.

    With "stop" it reads what it has seen where the run waits for the device anyway, at logs, and
    before anything is saved. With "skip" it has to know before the optimizer's step, and reads two
    numbers there.

    Args:
        what: "stop" or "skip".
        record: where the steps are written down; None on ranks that write none.

    Attributes:
        count: steps that were not finite.
    """

    def __init__(self, trainer: Any, what: str, record: Metrics | None) -> None:
        assert what in NON_FINITE
        self._trainer, self._record, self._skips = trainer, record, what == "skip"
        self._micro_batches: list[tuple[tuple[str, ...], Tensor]] = []
        self._steps: list[_Step] = []
        self._norm: Any = None
        self._last: Tensor | None = None
        self.count = 0
        if self._skips and trainer.is_deepspeed_enabled:
            raise ValueError(
                "non_finite: expected stop under DeepSpeed, whose backward takes the optimizer's "
                "step as well; got skip"
            )

    def see_loss(self, loss: Tensor, facts: Facts | None) -> Tensor:
        """A micro-batch's loss. Returns what is to be logged of it."""
        is_bad = ~loss.detach().isfinite()
        before = torch.zeros_like(loss) if self._last is None else self._last
        if facts is not None and not facts.labels:  # the mean over none may be 0 / 0
            is_bad, shown = torch.zeros_like(is_bad), torch.where(is_bad, before, loss)
        else:
            shown = torch.where(is_bad, before, loss) if self._skips else loss
        self._last = shown
        self._micro_batches.append((() if facts is None else facts.where, is_bad))
        return shown

    def see_gradient(self, norm: Any) -> None:
        """The norm of the gradient that the optimizer gets, or none."""
        # A GradScaler overflows from time to time, and leaves such steps out by itself
        has_scaler = self._trainer.accelerator.scaler is not None
        self._norm = None if has_scaler else norm

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All of a step is known."""
        losses = torch.stack([flag for _, flag in self._micro_batches])
        norm = self._norm
        if isinstance(norm, Tensor):
            bad_norm = ~whole(norm).isfinite()
        else:
            is_bad = norm is not None and not math.isfinite(norm)
            bad_norm = losses.new_full((), is_bad)  # filled there: a copy would wait
        flags = torch.stack([losses.any(), bad_norm.to(losses.device)]).float()
        where = [names for names, _ in self._micro_batches]
        self._micro_batches = []
        self._steps.append(_Step(state.global_step + 1, where, flags, losses))
        if self._skips and self._judge() and self._trainer.accelerator.scaler is None:
            self._trainer.optimizer.zero_grad()

    def judge(self) -> None:
        """Look at the steps since the last time.

        Raises:
            NonFiniteError: one of them was not finite, and the run is to stop.
        """
        self._judge()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._judge()

    def _judge(self) -> bool:
        steps, self._steps = self._steps, []
        if not steps:
            return False
        flags = torch.stack([step.flags for step in steps])
        found = self._trainer.accelerator.reduce(flags, reduction="sum").tolist()
        bad = [(step, *of) for step, of in zip(steps, found, strict=True) if any(of)]
        for step, bad_losses, _ in bad:
            self._name(step, "loss" if bad_losses else "gradient")
        return bool(bad)

    def _name(self, step: _Step, what: str) -> None:
        """Write a step down; each rank says which of its samples it may have been."""
        mine = step.losses.tolist() if what == "loss" else [True] * len(step.where)
        where: Sequence[str] = gather_object(
            [
                name
                for names, is_bad in zip(step.where, mine, strict=True)
                if is_bad
                for name in names
            ]
        )
        self.count += 1
        if self._record is not None:
            self._record.write(step.step, {"what": what, "where": list(where)})
        if not self._skips:
            shown = ", ".join(where[:_NAMED]) + f", and {len(where) - _NAMED} more" * (
                len(where) > _NAMED
            )
            raise NonFiniteError(
                f"non_finite: the {what} of step {step.step} is not finite; its samples: "
                f"{printable(shown)}. Look at them, at the learning rate and at the precision; "
                "non_finite: skip leaves such steps out"
            )
