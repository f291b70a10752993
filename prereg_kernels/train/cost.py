# SPDX-License-Identifier: Apache-2.0
"""What the stages of a run would take: time and memory of a step, by the model's config alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prereg_kernels.attach.resolver import find_family
from prereg_kernels.estimate.batches import made_up_batches
from prereg_kernels.estimate.devices import DEVICES
from prereg_kernels.estimate.estimate import estimate
from prereg_kernels.estimate.memory import How
from prereg_kernels.estimate.report import short
from prereg_kernels.estimate.settings import Settings
from prereg_kernels.estimate.walk import walk
from prereg_kernels.train.config import StageConfig, TrainConfig
from prereg_kernels.train.models import model_on_meta
from prereg_kernels.train.parts import parts_of
from prereg_kernels.train.run import training_arguments


def describe_cost(config: TrainConfig) -> str:
    """A line a stage: of a step whose samples are all as long as `max_length`, one image each."""
    return "\n".join(f"stage {stage.name}: {_cost(config, stage)}" for stage in config.stages)


def _cost(config: TrainConfig, stage: StageConfig) -> str:
    if config.lora is not None:
        return "time and memory are not estimated with LoRA"
    arguments = training_arguments(config, stage, Path(config.out))
    model = model_on_meta(config.model)
    weights = "bfloat16" if next(model.parameters()).dtype.itemsize == 2 else "float32"
    if arguments.bf16 or arguments.fp16:
        model = model.to(torch.bfloat16)
    try:
        batches = made_up_batches(model, find_family(model))
        structure = walk(model, batches, config.model, parts_of(model), stage.trainable)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        settings = Settings(
            images_per_step=arguments.train_batch_size * ranks,
            tokens=max(1, config.max_length - structure.visual_tokens),
            gpus=ranks,
            gpu="cpu" if arguments.use_cpu and ranks == 1 else _gpu(),
            parallel=_engine(arguments),
            checkpointing=arguments.gradient_checkpointing,
            train=stage.trainable,
            weights=weights,
            **_pre(config.pre_of(stage)),
        )
        found = estimate(structure, settings)
    except ValueError as error:
        return f"time and memory are not estimated: {error}"
    how: How = "none" if config.pre_of(stage) is None else "fused"
    words = f"at most {short(found, how, arguments.gradient_accumulation_steps)}"
    return f"{words}; on {settings.gpu}, samples of {config.max_length} tokens"


def _pre(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """PRe's settings, as the estimate has them; of several layers the first."""
    given = given or {}
    layers = given.get("layers")
    names = ("head_features", "depth", "token_fraction")
    found = {name: given[name] for name in names if given.get(name) is not None}
    return found | {"pre_layer": layers[0] if isinstance(layers, (list, tuple)) else layers}


def _gpu() -> str:
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((kind for kind in DEVICES if kind in name), "h100")


def _engine(arguments: Any) -> str:
    if arguments.deepspeed:
        return "zero3" if arguments.hf_deepspeed_config.is_zero3() else "zero2"
    return "fsdp" if arguments.fsdp else "ddp"
