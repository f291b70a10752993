# SPDX-License-Identifier: Apache-2.0
"""The reference training loop: LLaVA's stages, with or without PRe, resumable bit for bit. A stage
on descriptions of scenes in words can come before them. stages.py has the steps of a stage.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from prereg_kernels._util.settings_file import to_dict
from prereg_kernels.attach.handle import PRe
from prereg_kernels.attach.regularizer import apply_pre, remove_pre
from prereg_kernels.attach.storage import PRE_DIR
from prereg_kernels.demo.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_same_config,
    clear_checkpoints,
    latest_checkpoint,
    restore_optimizer,
    save_checkpoint,
    set_damaged_aside,
)
from prereg_kernels.demo.config import CONTROLS, RunConfig, StageConfig
from prereg_kernels.demo.data.packing import Packer, build_tokenizer
from prereg_kernels.demo.metrics import MetricsLog, ProgressBar
from prereg_kernels.demo.model.llava import (
    attention_implementation,
    other_scene_anchor,
    set_trainable,
)
from prereg_kernels.demo.model.saved import check_model, load_model, model_writer
from prereg_kernels.demo.model.tower import new_model
from prereg_kernels.demo.runs.interrupts import deferred_signals
from prereg_kernels.demo.runs.processes import check_one_process
from prereg_kernels.demo.runs.runs import held_run, write_settings
from prereg_kernels.demo.stages import StageSteps
from prereg_kernels.demo.training_checkup import CheckupLog, training_checkup


class TrainingInterrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """SIGINT or SIGTERM arrived; the step was finished and saved.

    Attributes:
        step: optimizer steps done.
        checkpoint: where they are saved.
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; saved {checkpoint}; run again to resume")
        self.step, self.checkpoint = step, checkpoint


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        model: the trained model, PRe removed, in eval mode.
        packer: packs scenes and questions for it.
        checkpoint: its last checkpoint, a Hugging Face directory.
        step_seconds: median time of a step in this call (data, forward, backward, optimizer), over
            the last stage; nan where there was nothing left to do.
        seconds: time that the steps of this call took.
    """

    model: LlavaForConditionalGeneration
    packer: Packer
    checkpoint: Path
    step_seconds: float
    seconds: float


def train(
    config: RunConfig,
    out_dir: str | Path,
    resume: bool = True,
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    tensorboard: bool = True,
    device: str | torch.device = "cpu",
) -> RunResult:
    """Train a run into `out_dir`: checkpoints/, metrics.jsonl, tensorboard/ and config.yaml.

    Args:
        resume: go on from the newest checkpoint in `out_dir`, if there is one. False: delete what
            is there and start anew.
        cache_dir: where trained towers are kept for other runs; by default in `out_dir`.
        progress: show a progress bar.

    Raises:
        ValueError: the checkpoint in `out_dir` was trained with other settings; or `out_dir` holds
            what is not a run's, or is in use; or there are several processes (torchrun).
        CheckpointError: a checkpoint could not be written or read.
        TrainingInterrupted: a signal asked to stop; the run is saved and can be resumed.
    """
    check_one_process()
    run_dir = Path(out_dir)
    with held_run(run_dir, config):
        saved = latest_checkpoint(run_dir) if resume else None
        if saved is not None:
            check_same_config(saved, to_dict(config))
            _check_place(saved, config)
            for line in set_damaged_aside(saved):
                warnings.warn(line, stacklevel=2)
        if not resume:
            clear_checkpoints(run_dir)
        write_settings(config, run_dir)
        cache = Path(cache_dir or run_dir)
        return _train(config, run_dir, saved, cache, progress, tensorboard, torch.device(device))


def _train(
    config: RunConfig,
    run_dir: Path,
    saved: Checkpoint | None,
    cache_dir: Path,
    progress: bool,
    tensorboard: bool,
    target: torch.device,
) -> RunResult:
    """As `train`, from where `saved` stands."""
    tokenizer = build_tokenizer(config.scenes)
    model = _initial_model(config, saved, cache_dir, target)
    model.train()
    packer = Packer(tokenizer, config.scenes.patches)
    step = saved.step if saved is not None else 0
    path = saved.path if saved is not None else run_dir
    pre: PRe | None = None
    times: list[float] = []
    seconds, first = 0.0, 0
    log = MetricsLog(run_dir, step, tensorboard=tensorboard)
    checkups = CheckupLog(run_dir, step)
    bar = ProgressBar(run_dir.name, step, config.steps, shown=progress)
    with (
        contextlib.closing(log),
        contextlib.closing(checkups),
        bar,
        deferred_signals() as stop_requested,
    ):
        for index, stage in enumerate(config.stages):
            last = first + stage.steps
            if step >= last:
                first = last
                continue
            set_trainable(model, stage.trainable, stage.frozen_layers)
            pre = _attach_pre(model, config, stage, pre)
            steps = StageSteps(model, packer, config, index, pre)
            if saved is not None:
                own = steps.optimizer if saved.stage == index else None
                _restore(saved, model, pre, config, own)
                saved = None
            times = []
            while step < last:
                start = time.perf_counter()
                values = steps(step - first)
                times.append(time.perf_counter() - start)
                seconds += times[-1]
                step += 1
                values = {**values, "seconds": times[-1]}
                log.write(step, values)
                bar.update(step, values)
                if config.checkup_every is not None and step % config.checkup_every == 0:
                    checkups.write(step, training_checkup(model, packer, config))
                stopping = stop_requested()
                if stopping or step % config.checkpoint_every == 0 or step == config.steps:
                    log.flush()
                    checkups.flush()
                    path = save_checkpoint(
                        run_dir,
                        step=step,
                        stage=index,
                        config=to_dict(config),
                        optimizer=steps.optimizer,
                        write_model=model_writer(model, tokenizer),
                    )
                if stopping:
                    raise TrainingInterrupted(step, path)
            first = last
        if stop_requested():  # during the last checkpoint
            raise TrainingInterrupted(step, path)
    if pre is not None:
        remove_pre(model)
    model.set_attn_implementation("sdpa")  # who goes on may do so in fp32, unlike flash-attention
    return RunResult(
        model=model.eval(),
        packer=packer,
        checkpoint=path,
        step_seconds=sorted(times)[len(times) // 2] if times else float("nan"),
        seconds=seconds,
    )


def _check_place(saved: Checkpoint, config: RunConfig) -> None:
    """Raise CheckpointError unless the checkpoint's step is one of its stage's."""
    stages = config.stages[: saved.stage + 1]
    last = sum(stage.steps for stage in stages)
    if saved.stage >= len(config.stages) or not last - stages[-1].steps < saved.step <= last:
        raise CheckpointError(f"{saved.path}: step {saved.step} is none of stage {saved.stage}")


def _restore(
    saved: Checkpoint,
    model: LlavaForConditionalGeneration,
    pre: PRe | None,
    config: RunConfig,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Put back the heads, the generators and, of the stage that goes on, the optimizer."""
    if pre is not None and config.stages[saved.stage].pre:
        try:
            pre.load(saved.path / PRE_DIR)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"could not load the heads of {saved.path}: {error}") from error
    before = sum(stage.steps for stage in config.stages[: saved.stage])
    idle = set(model.model.vision_tower.parameters())  # its last norm is on nobody's way
    restore_optimizer(saved, optimizer, steps=saved.step - before, idle=idle)


class Stepper:
    """A single stage's training step by itself, to measure what it costs.

    Args:
        config: the run.
        cache_dir: where trained towers are kept.
    """

    def __init__(
        self, config: RunConfig, cache_dir: str | Path, device: str | torch.device = "cpu"
    ) -> None:
        stage = config.stages[0]
        model = _initial_model(config, None, Path(cache_dir), torch.device(device))
        model.train()
        set_trainable(model, stage.trainable, stage.frozen_layers)
        pre = _attach_pre(model, config, stage, None)
        packer = Packer(build_tokenizer(config.scenes), config.scenes.patches)
        self._steps = StageSteps(model, packer, config, 0, pre)
        self._device, self._lr = model.device, stage.lr

    def timed_step(self, i: int) -> float:
        """Do training step `i` (from 0) at the peak learning rate; returns its seconds."""
        start = time.perf_counter()
        self._steps(i, self._lr)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the optimizer is still at work
        return time.perf_counter() - start


def _initial_model(
    config: RunConfig,
    saved: Checkpoint | None,
    cache_dir: Path,
    device: torch.device,
) -> LlavaForConditionalGeneration:
    """The model to go on with: from the run's checkpoint, from `init_from`, or new."""
    attention = attention_implementation(
        device, precision=config.precision, block_mask=config.questions_per_scene > 1
    )
    if saved is not None:
        model = load_model(saved.path, attention=attention, own=True)
        check_model(model, config, saved.path)
        return model.to(device)
    if config.init_from is not None:
        model = load_model(config.init_from, attention=attention)
        check_model(model, config, config.init_from)
        return model.to(device)
    return new_model(config, cache_dir, attention=attention, device=device)


def _attach_pre(
    model: LlavaForConditionalGeneration, config: RunConfig, stage: StageConfig, pre: PRe | None
) -> PRe | None:
    """PRe as the stage wants it; its heads live on from a stage before that had it too."""
    if not stage.pre:
        if pre is not None:
            remove_pre(model)
        return None
    if pre is not None:
        pre.heads[config.pre.layer].requires_grad_(True)  # set_trainable froze all there was
        return pre
    anchor: Any = config.pre.anchor
    if anchor in CONTROLS.values():
        before = anchor == CONTROLS["pre_projector"]
        anchor = other_scene_anchor(model, before_projector=before)
    return apply_pre(
        model,
        layers=[config.pre.layer],
        weight=config.pre.weight,
        anchor=anchor,
        anchor_features=config.model.width if callable(anchor) else None,
        token_fraction=config.pre.token_fraction,
        seed=config.seed,
    )
