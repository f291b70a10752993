# SPDX-License-Identifier: Apache-2.0
"""What a trainer's steps were: written by Trainer's own methods, which all trainers here end in.

STEP.pt, with .RANK before it on other ranks than 0: "weights" before the step, "batches" as
`training_step` got them (or made of lists of rows, as GRPO does), "gradients" before they were
clipped. end.pt: the weights at the end.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def install(module: ModuleType) -> None:
    """Put it into this module's Trainer."""
    import accelerate

    trainer: Any = module.Trainer
    folder = Path(os.environ["RECORDED"])
    folder.mkdir(parents=True, exist_ok=True)
    step: dict[str, Any] = {}
    models: list[nn.Module] = []
    run, clip, train = trainer.training_step, accelerate.Accelerator.clip_grad_norm_, trainer.train
    make = trainer.__init__

    def training_step(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        models[:] = [self.model]
        if not step:
            step["weights"] = _copies(dict(self.model.named_parameters()))
            step["batches"] = []
        if isinstance(inputs, Mapping):
            step["batches"].append(_copies(inputs))
            return run(self, model, inputs, *args, **kwargs)
        prepare = self._prepare_inputs

        def prepare_inputs(rows: Any) -> Any:
            batch = prepare(rows)
            if rows is inputs:
                step["batches"].append(_copies(batch))
            return batch

        self._prepare_inputs = prepare_inputs
        try:
            return run(self, model, inputs, *args, **kwargs)
        finally:
            del self._prepare_inputs

    def see_gradients() -> None:
        if "gradients" not in step:
            named = models[0].named_parameters()
            step["gradients"] = {n: p.grad.clone() for n, p in named if p.grad is not None}

    def clip_grad_norm_(self: Any, *args: Any, **kwargs: Any) -> Any:
        see_gradients()
        return clip(self, *args, **kwargs)

    class Recorder(module.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_pre_optimizer_step(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            see_gradients()
            torch.save(step, folder / f"{_rank()}{state.global_step}.pt")
            step.clear()

    def train_and_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        weights = {"weights": _copies(dict(self.model.named_parameters()))}
        torch.save(weights, folder / f"{_rank()}end.pt")
        if config := getattr(self.model, "peft_config", None):
            config["default"].save_pretrained(folder)
        return result

    def make_with_recorder(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(Recorder)  # as ms-swift puts its own in the place of the default ones

    trainer.training_step, trainer.train = training_step, train_and_end
    trainer.__init__ = functools.wraps(make)(make_with_recorder)
    accelerate.Accelerator.clip_grad_norm_ = clip_grad_norm_


def _rank() -> str:
    rank = int(os.environ.get("RANK", "0"))
    return f"{rank}." if rank else ""


def _copies(values: Any) -> Any:
    return {n: x.detach().clone() if isinstance(x, Tensor) else x for n, x in values.items()}
