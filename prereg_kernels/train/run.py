# SPDX-License-Identifier: Apache-2.0
"""A run: its stages, one after the other, from what an earlier start has left."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from prereg_kernels._util.directories import held
from prereg_kernels._util.files import printable, write_whole
from prereg_kernels._util.machine import describe_machine
from prereg_kernels._util.settings_file import read_yaml, to_dict
from prereg_kernels.train.collator import Collator
from prereg_kernels.train.config import StageConfig, TrainConfig
from prereg_kernels.train.data_files import DATA_FILES, check_data
from prereg_kernels.train.engines import (
    check_ddp,
    check_launcher,
    check_processes,
    check_spread,
    device_of_cpus,
    prepare,
    save_whole,
)
from prereg_kernels.train.facts import CountingCollator
from prereg_kernels.train.global_batch import check_checkpoint, samples_of_step, without_batch
from prereg_kernels.train.held_out import CheckupCallback, HeldOut
from prereg_kernels.train.models import (
    check_steps,
    load_model,
    load_processor,
    visual_ids,
    warn_of_steps,
    with_adapter,
    without_adapter,
)
from prereg_kernels.train.order import GroupedSampler, Mixture, grouped, seed_of
from prereg_kernels.train.packing import estimate, order_of, packed, prepare_packing
from prereg_kernels.train.parts import set_trainable
from prereg_kernels.train.records import (
    BAD_SAMPLES,
    METRICS,
    NON_FINITE_STEPS,
    BadSamples,
    Metrics,
    has_logged,
)
from prereg_kernels.train.shared_pages import pages_shared
from prereg_kernels.train.source import Stream
from prereg_kernels.train.sources import open_source
from prereg_kernels.train.streaming import Group, StreamBatches, StreamLoader, first_samples
from prereg_kernels.train.trainer import WRITING, RecipeTrainer, flush, full_disk_named
from prereg_kernels.train.wandb_runs import check_wandb, finish_wandb
from prereg_kernels.trainers import with_pre

WATCH_STEPS = 50
"""`watch_steps` where PRe's settings do not say."""
STAGES = "stages"
DONE = "done.json"
SETTINGS = "config.yaml"
ENVIRONMENT = "environment.json"
_RECORDS = (
    SETTINGS, DATA_FILES, ENVIRONMENT, METRICS, BAD_SAMPLES, NON_FINITE_STEPS, f"{STAGES}/",
    "tensorboard/", "wandb/",
)  # fmt: skip
# Of the model: what somebody else's folder would have as well
_NAMES = (*_RECORDS, "config.json", "model.safetensors", "tokenizer.json", "pre/")


class Stopped(Exception):  # noqa: N818 - not an error: it was asked for
    """The run was asked to stop, and has saved."""


def train(config: TrainConfig, *, fresh: bool = False) -> Path:
    """Train all stages; what is finished is not done again. Returns the model's folder.

    Args:
        fresh: begin anew, and delete what an earlier start has left.

    Raises:
        ValueError: settings, a model or data that are not as expected, or too many bad samples.
        OSError: a file cannot be read or written.
        Stopped: it was asked to by SIGTERM.
    """
    check_launcher()
    out, is_cpu = Path(config.out), bool(config.trainer.get("use_cpu"))
    with device_of_cpus(is_cpu), _held(out, state := PartialState(cpu=is_cpu)):
        if state.is_main_process:
            _prepare(config, out, fresh)
        state.wait_for_everyone()
        sources = cache(open_source)
        for stage in config.stages:  # so that what is wrong with them is said before any trains
            if not (out / STAGES / stage.name / DONE).exists():
                for data in config.data_of(stage):
                    sources(data)
        path: str | Path = config.model
        for stage in config.stages:
            folder = out / STAGES / stage.name
            is_last = stage is config.stages[-1]
            if not (folder / DONE).exists():
                _train_stage(config, stage, path, folder, out if is_last else folder / "model",
                             [sources(data) for data in config.data_of(stage)])  # fmt: skip
            path = folder / "model"
    return out


def _train_stage(
    config: TrainConfig,
    stage: StageConfig,
    path: str | Path,
    folder: Path,
    result: Path,
    sources: list[Any],
) -> None:
    arguments = training_arguments(config, stage, folder)
    check_processes(arguments, config.model_arguments)
    set_seed(arguments.seed)
    is_first = arguments.process_index == 0
    # Trainer's own writer would go to a folder by the time of the start
    report_to = arguments.report_to
    arguments.report_to = [name for name in report_to if name != "tensorboard"]
    has_adapter = config.lora is not None and "llm" in stage.trainable
    processor = load_processor(path)
    model = load_model(config, path, has_adapter=has_adapter)
    check_spread(arguments, model)
    ids = visual_ids(model)
    collator = Collator(processor, config.max_length, ids)
    collator.hides_image = config.is_streaming(stage) and arguments.world_size > 1
    if config.packing_length is not None:
        prepare_packing(model, collator, config.packing_length)
    collate = CountingCollator(collator, ids)
    if has_adapter:
        assert config.lora is not None
        set_seed(arguments.seed)  # under ZeRO-3, loading has drawn other numbers
        model = with_adapter(model, config.lora, stage.trainable)
    else:
        set_trainable(model, stage.trainable)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    step = int(last.rsplit("-", 1)[1]) if last else 0
    weights = [data.weight for data in config.data_of(stage)]
    stream: StreamLoader | None = None
    order: GroupedSampler | None = None
    mixture: Mixture | None = None
    if config.is_streaming(stage):
        names = [data.path for data in config.data_of(stage)]
        stream = _stream(
            arguments, sources, names, weights, collator, collate, config.packing_length
        )
        if last is not None:
            stream.load(Path(last))
    else:
        mixture = Mixture(sources)
        order = order_of(
            mixture,
            weights,
            samples_of_step(arguments),
            seed_of(arguments),
            lambda: collator,
            config.packing_length,
        )
    if is_first and order is not None:
        for kind, count in order.repeated().items():
            warnings.warn(
                f"data: stage {stage.name} has {count} samples {kind}, fewer than a step takes; "
                f"an epoch repeats them up to {order.unit}",
                stacklevel=2,
            )
    bad_samples = BadSamples(Path(config.out), config.max_bad, stage.name)
    bad_samples.go_on(step, last, is_writing=is_first)
    pre = config.pre_of(stage)
    trainer_class: Any = RecipeTrainer
    if pre is not None:
        watched = {} if pre.get("level") == "global" else {"watch_steps": WATCH_STEPS}
        trainer_class = with_pre(RecipeTrainer, **{**watched, **pre})
    records = Path(config.out)
    trainer = trainer_class(
        model,
        arguments,
        data_collator=collate,
        train_dataset=mixture if stream is None else stream.dataset,
        processing_class=processor,
        order=order,
        stream=stream,
        metrics=Metrics(records, stage.name, step) if is_first else None,
        bad_samples=bad_samples,
        non_finite=config.non_finite,
        non_finite_steps=Metrics(records, stage.name, step, NON_FINITE_STEPS) if is_first else None,
    )
    if not trainer.is_deepspeed_enabled:  # which has float32 copies of what it steps
        check_steps(model)
        is_upcast = trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"
        if is_first and not is_upcast:
            warn_of_steps(model)
    if config.checkup is not None:
        held_out = HeldOut(config.checkup, without_adapter(trainer.model), processor)
        trainer.add_callback(CheckupCallback(trainer, held_out, config.checkup.steps))
    if is_first and "tensorboard" in report_to:
        board = SummaryWriter(str(Path(config.out) / "tensorboard" / stage.name), purge_step=step)
        trainer.add_callback(TensorBoardCallback(board))
    prepare(trainer)
    has_text_alone = mixture is not None and bool((mixture.images == 0).any())
    # PRe's heads get a gradient there too, of 0
    check_ddp(trainer, leaves_out=has_text_alone and set(stage.trainable) != {"llm"})
    if last is not None:
        check_checkpoint(Path(last), trainer)
    with trainer.stop.listening(), pages_shared():
        trainer.train(resume_from_checkpoint=last)
    finish_wandb(report_to)
    if trainer.stop.is_stopped:
        raise Stopped(f"stopped at step {trainer.state.global_step} of {stage.name}")
    plain = partial(load_model, config, path, has_adapter=False)
    names = _save(trainer, folder, result, plain)
    if arguments.should_save:
        done = {"step": trainer.state.global_step, "files": names}
        write_whole(folder / DONE, json.dumps(done) + "\n")
    trainer.accelerator.wait_for_everyone()


def _stream(
    arguments: TrainingArguments,
    streams: Sequence[Stream],
    names: Sequence[str],
    weights: Sequence[float],
    collator: Collator,
    collate: CountingCollator,
    packing_length: int | None,
) -> StreamLoader:
    # What is skipped of a stream is behind the place that its checkpoint names
    arguments.ignore_data_skip = True
    group: Group = partial(grouped, size=arguments.train_batch_size)
    if packing_length is not None:
        by = estimate(collator, [x for stream in streams for x in first_samples(stream)])
        size = arguments.train_batch_size
        group = partial(packed, size=size, by=by, length=packing_length)
    batches = StreamBatches(
        streams,
        names,
        weights,
        seed=seed_of(arguments),
        rank=arguments.process_index,
        ranks=arguments.world_size,
        group=group,
        collate=collate,
    )
    return StreamLoader(
        batches,
        arguments.max_steps * arguments.gradient_accumulation_steps,
        arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory and torch.cuda.is_available(),
        prefetch_factor=arguments.dataloader_prefetch_factor,
        multiprocessing_context=arguments.dataloader_multiprocessing_context,
    )


def training_arguments(config: TrainConfig, stage: StageConfig, folder: Path) -> TrainingArguments:
    """transformers' own, of a stage.

    Raises:
        ValueError: it refuses them.
    """
    given = {**config.trainer, **stage.trainer}
    defaults = {
        "report_to": "tensorboard",
        "run_name": f"{Path(config.out).name}-{stage.name}",
        "logging_steps": 10,
        # It hides them, and waits for the device in each micro-batch to do so: see non_finite
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
    }
    try:
        arguments = TrainingArguments(
            output_dir=str(folder), remove_unused_columns=False, **{**defaults, **given}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"trainer: {' '.join(str(error).split())}") from None
    checkpointing = {"use_reentrant": False, **(arguments.gradient_checkpointing_kwargs or {})}
    if arguments.gradient_checkpointing:
        arguments.gradient_checkpointing_kwargs = checkpointing
    if arguments.ddp_find_unused_parameters is None:
        # Batches of text alone leave the vision encoder and the projector out. A reentrant
        # checkpoint hides its parameters from DDP, which would take all of them for left out.
        is_hidden = arguments.gradient_checkpointing and checkpointing["use_reentrant"]
        arguments.ddp_find_unused_parameters = not is_hidden
    check_wandb(arguments.report_to, Path(config.out))
    return arguments


def _save(trainer: Any, folder: Path, result: Path, load: Callable[[], nn.Module]) -> list[str]:
    """The stage's model: written beside, then moved to `result`. Returns the names there."""
    beside = folder / WRITING
    if trainer.args.should_save:
        shutil.rmtree(beside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with full_disk_named(beside):
        save_whole(trainer, beside, load)
    names = sorted(path.name for path in beside.iterdir()) if trainer.args.should_save else []
    if names:
        flush(beside)
        result.mkdir(exist_ok=True)
    for name in names:
        if (result / name).is_dir():
            shutil.rmtree(result / name)
        os.replace(beside / name, result / name)
    return names


@contextmanager
def _held(out: Path, state: PartialState) -> Iterator[None]:
    """One command at a time; the first rank holds the folder for all."""
    if not state.is_main_process:
        yield
        return
    with held(out, "training", _NAMES, lambda _: False, _is_checkpoint):
        yield


def _is_checkpoint(path: Path) -> bool:
    return (path / "trainer_state.json").is_file()


def _prepare(config: TrainConfig, out: Path, fresh: bool) -> None:
    """Write the settings, the data's facts and the environment, or see that settings and data are
    those of an earlier start."""
    settings = out / SETTINGS
    written = to_dict(config)
    if fresh or (settings.exists() and not _has_trained(out)):
        done = [json.loads(path.read_text()) for path in (out / STAGES).glob(f"*/{DONE}")]
        for name in (*_RECORDS, *(name for stage in done for name in stage["files"])):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    is_new = not settings.exists()
    if not is_new and (
        difference := _difference(without_batch(read_yaml(settings)), without_batch(written))
    ):
        raise ValueError(
            f"{printable(out)}: holds a run of other settings: {difference}; expected the same, "
            "another --out, or --fresh to begin anew"
        )
    check_data(out, config.data, is_new=is_new)
    write_whole(settings, yaml.safe_dump(written, sort_keys=False))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = describe_machine(device, None)
    write_whole(out / ENVIRONMENT, json.dumps(facts, indent=1) + "\n")


def _has_trained(out: Path) -> bool:
    """Whether an earlier start has logged or saved a step. One that ended before, as by an error in
    its data, has left nothing to go on from: settings and data may be mended."""
    stages = out / STAGES
    has_saved = any(stages.glob("*/checkpoint-*")) or any(stages.glob(f"*/{DONE}"))
    return has_saved or has_logged(out / METRICS)


def _difference(before: Any, after: Any, at: str = "") -> str:
    """The first setting that differs, or ""."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in {**before, **after}:
            if found := _difference(before.get(name), after.get(name), f"{at}.{name}".lstrip(".")):
                return found
        return ""
    return "" if before == after else f"{at}: expected {before!r}, got {after!r}"
