# SPDX-License-Identifier: Apache-2.0
"""A stage of training, step by step: its data, its optimizer, its gradient over micro-batches.

`train` of loop.py runs a run's stages into a directory. `train_stage` runs one in memory.

What a step minimises: the mean cross-entropy over all the step's answers + weight * the mean of
L_PRe over all its visual tokens. Both means are over the step: each micro-batch sums and divides by
the step's counts, so that 1 x 8 and 4 x 2 scenes give one gradient, however unevenly answers fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from prereg_kernels.attach.handle import PRe
from prereg_kernels.demo.config import RunConfig, StageConfig
from prereg_kernels.demo.data.packing import IGNORE, Batch, Packer, TrainStream, build_tokenizer
from prereg_kernels.demo.model.llava import set_trainable
from prereg_kernels.demo.schedule import cosine_with_warmup


class StageSteps:
    """A stage's training steps on a model whose parts are set to train, PRe attached or not.

    Attributes:
        optimizer: the stage's own.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        packer: Packer,
        config: RunConfig,
        index: int,
        pre: PRe | None,
    ) -> None:
        stage = config.stages[index]
        self.optimizer = _optimizer(model, config, stage)
        self._model, self._config, self._index, self._pre = model, config, index, pre
        self._stream = stage_stream(config, stage, packer)
        # each kind of data is counted by itself: a stage of text shifts no other's scenes
        self._before = sum(s.steps for s in config.stages[:index] if s.data == stage.data)

    def __call__(self, i: int, lr: float | None = None) -> dict[str, Any]:
        """Do step `i` (from 0), at the schedule's learning rate or at `lr`.

        Returns:
            "stage", "lm_loss", "pre_loss" (where PRe is on), "grad_norm" and "lr".
        """
        stage = self._config.stages[self._index]
        if lr is None:
            lr = stage.lr * cosine_with_warmup(i, stage.steps, stage.warmup)
        batches = self._stream.micro_batches(self._before + i)
        values = _step(self._model, self.optimizer, batches, lr, self._config, self._pre)
        return {"stage": self._index, **values, "lr": lr}


def train_stage(
    model: LlavaForConditionalGeneration, config: RunConfig, index: int, pre: PRe | None = None
) -> list[dict[str, Any]]:
    """Train one of a run's stages in memory, as `train` does; nothing is written.

    Args:
        model: from `new_model`, after the stages before.
        index: of the stage, from 0.
        pre: the handle, if you have attached PRe; the run's own settings of PRe are not read.

    Returns:
        What `StageSteps` returns of each step.
    """
    model.train()
    set_trainable(model, config.stages[index].trainable, config.stages[index].frozen_layers)
    for head in pre.heads.values() if pre is not None else ():
        head.requires_grad_(True)  # set_trainable froze all there was
    packer = Packer(build_tokenizer(config.scenes), config.scenes.patches)
    steps = StageSteps(model, packer, config, index, pre)
    return [steps(i) for i in range(config.stages[index].steps)]


def stage_stream(config: RunConfig, stage: StageConfig, packer: Packer) -> TrainStream:
    """The data of a run's stage."""
    return TrainStream(
        config.scenes.open("train", config.seed),
        packer,
        config.families,
        config.questions_per_scene,
        config.micro_batch,
        config.accumulation,
        config.distinct_scenes,
        text=stage.data == "text",
    )


def _optimizer(
    model: LlavaForConditionalGeneration, config: RunConfig, stage: StageConfig
) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=stage.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def _step(
    model: LlavaForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    lr: float,
    config: RunConfig,
    pre: PRe | None,
) -> dict[str, float]:
    """One optimizer step over its micro-batches; returns the losses and the gradient's norm."""
    optimizer.zero_grad()
    values = accumulate_gradients(model, batches, pre, precision=config.precision)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return {**values, "grad_norm": float(norm)}


def accumulate_gradients(
    model: LlavaForConditionalGeneration,
    batches: Sequence[Batch],
    pre: PRe | None = None,
    *,
    precision: str = "fp32",
) -> dict[str, float]:
    """Add a step's gradient, over all its micro-batches, to the parameters' `.grad`.

    Returns:
        "lm_loss", the mean over the step's answers, and, where PRe is on, "pre_loss", the mean over
        its visual tokens.
    """
    device = model.device
    answers = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    image_token = model.config.image_token_id
    visual = [int((batch["input_ids"] == image_token).sum()) for batch in batches]
    if pre is not None:
        pre.denominator = sum(visual)
    lm_loss, pre_loss = 0.0, 0.0
    for batch, tokens in zip(batches, visual, strict=True):
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**inputs, num_items_in_batch=answers).loss
        loss.backward()
        lm_loss += loss.item()  # its value is L_LM alone: PRe is computed in backward
        if pre is not None:
            pre_loss += pre.metrics()["pre_loss"] * tokens / sum(visual)
    return {"lm_loss": lm_loss} if pre is None else {"lm_loss": lm_loss, "pre_loss": pre_loss}
