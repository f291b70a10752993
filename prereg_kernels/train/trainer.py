# SPDX-License-Identifier: Apache-2.0
"""RecipeTrainer: transformers' Trainer with this package's order, checkpoints and records."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from prereg_kernels.attach.handle import get_pre
from prereg_kernels.train.collator import SEEN
from prereg_kernels.train.facts import FACTS, Facts
from prereg_kernels.train.global_batch import BATCH, describe_batch
from prereg_kernels.train.lost_ranks import ended_without_progress
from prereg_kernels.train.non_finite import NonFinite
from prereg_kernels.train.order import GroupedSampler
from prereg_kernels.train.records import PERIOD, BadSamples, Metrics
from prereg_kernels.train.streaming import StreamLoader
from prereg_kernels.train.throughput import Throughput
from prereg_kernels.trainers.checkpoints import load_weights

if TYPE_CHECKING:
    from torch import nn

WRITING = ".writing"
"""Below a stage's folder: where a checkpoint is until it is whole."""
HARDLY_ANY = 2**20
"""Bytes that are free on a disk on which nothing could be written."""


class RecipeTrainer(Trainer):
    """Trainer for a stage of `prereg train`; with PRe, `with_pre(RecipeTrainer)`.

    A checkpoint is written beside, then renamed: it is there whole or not at all, and the one
    before it stays until then.

    Args:
        order: the samples' numbers, epoch by epoch; None: of a stream.
        stream: its batches; None: of data that have an order.
        metrics: where the figures go; None on ranks that write none.
        bad_samples: counts what could not be used.
        non_finite: "stop" or "skip", at a loss or gradient that is NaN or infinite.
        non_finite_steps: where such steps are written down; None on ranks that write none.
    """

    leaves_out_non_finite = True  # of the figures of PRe; `NonFinite` tells of them

    def __init__(
        self,
        *args: Any,
        order: GroupedSampler | None,
        stream: StreamLoader | None = None,
        metrics: Metrics | None,
        bad_samples: BadSamples,
        non_finite: str = "stop",
        non_finite_steps: Metrics | None = None,
        **kwargs: Any,
    ) -> None:
        self._order, self._stream = order, stream
        self._metrics, self._bad_samples = metrics, bad_samples
        self._seen, self._bad = 0, list[tuple[str, str]]()
        self.is_writing = False
        self._facts: list[Facts] = []  # of the micro-batches to come
        super().__init__(*args, **kwargs)
        self._throughput = Throughput(self.model, _is_narrow(self))
        self._non_finite = NonFinite(self, non_finite, non_finite_steps)
        self.add_callback(self._non_finite)
        self.stop = StopOnSignal(self)
        self.add_callback(_CountBad(self))
        if stream is not None:
            self.add_callback(_ShareOfSteps())
        self.add_callback(self.stop)

    def _get_train_sampler(
        self, train_dataset: Dataset[Any] | None = None
    ) -> GroupedSampler | None:
        return self._order

    def get_train_dataloader(self) -> Any:
        """As Trainer's; a stream's own."""
        return super().get_train_dataloader() if self._stream is None else self._stream

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As Trainer's; what the collator says of its samples is taken out of the batches."""
        self._throughput.begin(self.state.global_step)
        self._facts = []

        def plain() -> Iterator[Any]:
            for batch in epoch_iterator:
                seen, bad = batch.pop(SEEN)
                self._seen += seen
                self._bad += bad
                if FACTS in batch:
                    self._facts.append(batch.pop(FACTS))
                    self._throughput.add(self._facts[-1])
                yield batch

        return super().get_batch_samples(plain(), num_batches, device)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; where no LLM trains, a batch of text alone can be gone back through too."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if loss.requires_grad or not (model.training and torch.is_grad_enabled()):
            return result
        # On all ranks at once (GroupedSampler), so that none waits for gradients of another
        loss = loss + torch.zeros_like(loss, requires_grad=True)
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    def is_time_to_judge(self, samples: int) -> bool:
        """Whether all ranks have seen enough since the last time, at so many a step or, with
        packing, at what there were so far."""
        counts = self._bad_samples
        rate = counts.seen / counts.step if counts.step else samples
        return (self.state.global_step - counts.step) * max(rate, 1) >= PERIOD

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        facts = self._facts.pop(0) if self._facts else None
        return self._non_finite.see_loss(super().training_step(*args, **kwargs), facts)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self._non_finite.see_gradient(norm)
        return norm

    def paused(self) -> AbstractContextManager[None]:
        """Around what is no part of training: the figures of speed leave it out."""
        return self._throughput.paused()

    def judge_bad_samples(self) -> None:
        """Add up what all ranks have seen since the last time."""
        [seen] = self.accelerator.reduce(
            torch.tensor([self._seen], device=self.args.device), reduction="sum"
        ).tolist()
        bad = gather_object(self._bad)
        self._seen, self._bad = 0, []
        self._bad_samples.add(self.state.global_step, seen, bad, is_writing=self.args.should_save)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, into metrics.jsonl too."""
        logs = dict(logs)
        is_regular = "loss" in logs and "learning_rate" in logs  # and so on all ranks
        if is_regular:
            logs.setdefault("lm_loss", logs["loss"])
            seconds, step = logs.get("pre_seconds"), self.state.global_step
            logs |= self._throughput.take(step, self.accelerator, seconds)
        try:
            if is_regular:
                self._non_finite.judge()
        finally:
            if is_regular and self._non_finite.count:
                logs["non_finite_steps"] = self._non_finite.count
            if self._metrics is not None:
                self._metrics.write(self.state.global_step, logs)
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        is_elsewhere = (
            self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(inner, "peft_config")
        )
        if get_pre(inner) is None and not is_elsewhere:
            load_weights(inner, resume_from_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, WRITING) if self.is_writing else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._non_finite.judge()
        self.judge_bad_samples()  # so that what is saved counts all that the steps have seen
        with self.paused():
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.is_writing = True
        try:
            with full_disk_named(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.is_writing = False
        if self._stream is not None:
            self._stream.save(folder / WRITING / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._bad_samples.save(folder / WRITING / name)
            batch = json.dumps(describe_batch(self))
            (folder / WRITING / name / BATCH).write_text(batch + "\n")
            flush(folder / WRITING / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(folder / WRITING / name, folder / name)
            rotate_checkpoints(output_dir=str(folder), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


def _is_narrow(trainer: Trainer) -> bool:
    """Whether the model's products are of 16-bit numbers."""
    dtypes = {p.dtype for p in trainer.model.parameters() if p.is_floating_point()}
    return trainer.args.bf16 or trainer.args.fp16 or not dtypes & {torch.float32, torch.float64}


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raise OSError for a full disk, whatever safetensors and torch say of it.

    Torch says nothing: there it is one if there is hardly any space left.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        is_full = "No space left" in str(error)
        if not is_full and "inline_container" in str(error):
            there = next(path for path in (folder, *folder.parents) if path.exists())
            is_full = shutil.disk_usage(there).free < HARDLY_ANY
        if not is_full:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def flush(folder: Path) -> None:
    """Put a folder's files on the disk. An error here is one of a disk that is full, or gone."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _CountBad(TrainerCallback):
    def __init__(self, trainer: RecipeTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        samples = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        if self._trainer.is_time_to_judge(samples):
            self._trainer.judge_bad_samples()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.judge_bad_samples()


class _ShareOfSteps(TrainerCallback):
    """The "epoch" of a stream's logs, which has no length. Trainer's begins anew on a resume."""

    def on_step_end(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


class StopOnSignal(TrainerCallback):
    """SIGTERM, as schedulers send before they kill: at the next log, save and stop on all ranks.

    Attributes:
        is_stopped: whether it was so.
    """

    def __init__(self, trainer: RecipeTrainer) -> None:
        self._trainer, self._is_asked, self.is_stopped = trainer, False, False
        self._micro_batch = 0.0  # when the last one was done

    def _last_progress(self) -> float:
        return time.monotonic() if self._trainer.is_writing else self._micro_batch

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """A micro-batch is done."""
        self._micro_batch = time.monotonic()

    def _ask(self, *_: Any) -> None:
        self._is_asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile SIGTERM asks, and ends nothing."""
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            with ended_without_progress(self._last_progress):
                yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At each log the ranks wait for each other anyway."""
        self._micro_batch = time.monotonic()
        if state.global_step % max(1, int(state.logging_steps)):
            return
        asked = torch.tensor([float(self._is_asked)], device=args.device)
        if self._trainer.accelerator.reduce(asked, reduction="sum").item():
            self.is_stopped = True
            control.should_save = control.should_training_stop = True
