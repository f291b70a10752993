# SPDX-License-Identifier: Apache-2.0
"""The weight of L_PRe in each step, and what L_PRe does to the gradients at the layers' states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.gradients import gradient_figures
from prereg_kernels.attach.handle import PRe, find_pre, state_of
from prereg_kernels.attach.passes import Record
from prereg_kernels.ops.probe import TapProbe

FASTEST = 2.0
"""By what factor `gradient_ratio` changes the weight at most each time: one batch is a sample."""
FARTHEST = 1000.0
"""And at most in all, as L_PRe may be solved, or L_LM."""
SAVED = "PReWeight"
"""Under which a checkpoint's `trainer_state.json` has the weight."""


def begin_step(pre: PRe, state: TrainerState, base: Tensor | None = None) -> None:
    """Set the weight of the step that comes, and whether it is watched.

    Args:
        base: 0-dim, what the schedule multiplies in place of the settings' weight.
    """
    config, step = pre.config, state.global_step
    if is_scheduled(config):
        weight = config.weight_at(step, state.max_steps)
        pre.weight = weight if base is None or not weight else base * (weight / config.weight)
    watched = config.watch_steps
    pre.watches_gradients = watched is not None and (step == 0 or (step + 1) % watched == 0)


def is_scheduled(config: PReConfig) -> bool:
    """Whether the weight is not the same in all steps."""
    is_constant = config.weight_schedule == "constant" and not config.weight_warmup_steps
    return config.gradient_ratio is not None or not is_constant


class LossWeight(TrainerCallback):
    """The weight of a PReTrainer, and the figures of the last watched step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._base: Tensor | None = None  # with `gradient_ratio`, the weight without its schedule
        self._sums: Tensor | None = None  # (layers, 3), of the micro-batches so far,
        self._probes: list[TapProbe] = []
        self._totals: Tensor | None = None  # and of a whole step, over all ranks,
        self._timed: list[TapProbe] = []  # and here

    @property
    def _pre(self) -> PRe:
        return find_pre(self._trainer.model)

    def write(self, state: TrainerState) -> None:
        """Before a checkpoint: what it needs to go on, in which JSON keeps a float32 as it is."""
        if self._base is not None:
            state.stateful_callbacks[SAVED] = {
                "args": {},
                "attributes": {"weight": float(self._base)},
            }

    def on_train_begin(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        """Go on with the weight of a checkpoint, or begin with that of the settings."""
        self._sums = self._totals = None
        config = self._pre.config
        if config.gradient_ratio is None:
            return
        saved = state.stateful_callbacks.get(SAVED)
        weight = saved["attributes"]["weight"] if saved else config.weight
        self._base = torch.tensor(weight, dtype=torch.float32, device=args.device)

    def on_step_begin(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        begin_step(self._pre, state, self._base)
        self._sums, self._probes = None, []

    def add(self, records: Sequence[Record]) -> None:
        """The passes of a micro-batch, after backward.

        Raises:
            ValueError: the weight follows gradients that none of a compiled model's passes shows.
        """
        for record in records:
            sums = record.gradient_sums()
            follows = self._base is not None and self._pre.watches_gradients
            if sums is None and follows and not record.is_idle:
                raise ValueError(
                    "gradient_ratio: a graph of the whole model shows no gradients at its layers; "
                    "expected torch_compile=False, or layers that you compile one by one, each by "
                    "layer.compile()"
                )
            if sums is not None:
                scaler = self._trainer.accelerator.scaler
                if scaler is not None:  # what it multiplies the loss by
                    sums = sums / scaler.scale(sums.new_ones(())).square()
                self._sums = sums if self._sums is None else self._sums + sums
                self._probes += record.probes.values()

    def on_step_end(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        """Add the ranks up, and lead the weight."""
        pre = self._pre
        pre.watches_gradients = False
        if self._sums is None:
            return
        self._totals = self._trainer.accelerator.reduce(self._sums, reduction="sum")
        self._totals = self._totals / state_of(pre).copies
        self._timed = self._probes
        if self._base is not None:
            self._base = self._led(self._base, state.global_step - 1)

    def _led(self, base: Tensor, step: int) -> Tensor:
        """Nearer to the weight whose gradient has the ratio to L_LM's, after this step."""
        config, totals = self._pre.config, self._totals
        assert totals is not None
        # The ratio at the weight without its schedule
        share = config.weight_at(step, self._trainer.state.max_steps) / config.weight
        lm, pre = totals[:, :2].sum(dim=0).to(base).sqrt()
        assert config.gradient_ratio is not None
        change = (config.gradient_ratio * share * lm / pre).clamp(1 / FASTEST, FASTEST)
        led = (base * change).clamp(config.weight / FARTHEST, config.weight * FARTHEST)
        return torch.where((lm > 0) & (pre > 0) & change.isfinite(), led, base)

    def end(self) -> None:
        """End a run: what comes after it has the weight of the settings."""
        self._pre.watches_gradients = False
        if is_scheduled(self._pre.config):
            self._pre.weight = self._pre.config.weight

    def take(self) -> dict[str, float]:
        """The figures since the last log."""
        pre, figures = self._pre, {}
        config, totals = pre.config, self._totals
        if is_scheduled(config):
            figures["pre_weight"] = float(pre.weight)
        if totals is None:
            return figures
        by_layer = dict(zip(pre.heads, totals.tolist(), strict=True))
        figures |= gradient_figures(by_layer, self._trainer._replicas())
        seconds = [s for probe in self._timed if (s := probe.seconds()) is not None]
        if seconds:
            figures["pre_seconds"] = sum(seconds)
        self._totals = None
        return figures
