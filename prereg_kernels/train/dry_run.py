# SPDX-License-Identifier: Apache-2.0
"""The dry run of `prereg train`: what a run would train, on what, without training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from prereg_kernels._util.files import printable
from prereg_kernels.checkup.images.reading import SkipImage, inside
from prereg_kernels.train.collator import Collator
from prereg_kernels.train.config import DataConfig, StageConfig, TrainConfig
from prereg_kernels.train.models import load_processor, model_on_meta, visual_ids
from prereg_kernels.train.order import Mixture, seed_of
from prereg_kernels.train.packing import order_of
from prereg_kernels.train.parts import PARTS, parts_of
from prereg_kernels.train.run import training_arguments
from prereg_kernels.train.sample import BadSampleError
from prereg_kernels.train.source import Source
from prereg_kernels.train.sources import open_source

_MOST = 10  # missing files that are named


def describe_run(config: TrainConfig) -> str:
    """Lines for people: the model, the data, each stage. Weights are not read.

    Raises:
        ValueError, OSError: as a run would.
    """
    model = model_on_meta(config.model)
    sizes = {part: 0 for part in PARTS}
    named = dict(model.named_parameters())
    for part, names in parts_of(model).items():
        sizes[part] = sum(named[name].numel() for name in names)
    parts = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
    lines = [f"model: {printable(config.model)}: {sum(sizes.values()):,} parameters ({parts})"]
    sources = {data: open_source(data) for data in config.data}
    for number, (data, source) in enumerate(sources.items()):
        lines += _of_data(number, data, source)
    for stage in config.stages:
        lines.append(_of_stage(config, stage, sources, sizes, visual_ids(model)))
    return "\n".join(lines)


def _of_data(number: int, data: DataConfig, source: Source) -> Iterator[str]:
    if data.streaming:
        yield f"data {number}: {printable(data.path)}: a stream, of which nothing is read here"
        return
    images, text = int(source.images.sum()), int((source.images == 0).sum())
    yield (
        f"data {number}: {printable(data.path)}: {len(source):,} samples, {images:,} images, "
        f"{text:,} samples of text alone"
    )
    bad, missing = [], []
    for place in range(len(source)):
        try:
            sample = source[place]
        except BadSampleError as error:
            bad.append(f"{source.where(place)}: {error}")
            continue
        root = sample.root
        for image in sample.images:
            if not isinstance(image, str) or root is None:
                continue
            try:
                if not inside(root, image).is_file():
                    missing.append(str(root / image))
            except SkipImage as reason:
                bad.append(f"{source.where(place)}: {image}: {reason}")
                break
    for what, found in (("samples cannot be used", bad), ("images are missing", missing)):
        if found:
            yield f"  {len(found):,} {what}:"
            yield from (f"    {printable(line)}" for line in found[:_MOST])


def _of_stage(
    config: TrainConfig,
    stage: StageConfig,
    sources: dict[DataConfig, Source],
    sizes: dict[str, int],
    ids: frozenset[int],
) -> str:
    arguments = training_arguments(config, stage, Path(config.out))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * ranks
    steps = arguments.max_steps
    if steps <= 0:
        data = config.data_of(stage)
        order = order_of(
            Mixture([sources[each] for each in data]),
            [each.weight for each in data],
            batch,
            seed_of(arguments),
            lambda: Collator(load_processor(config.model), config.max_length, ids),
            config.packing_length,
        )
        steps = math.ceil(len(order) // batch * arguments.num_train_epochs)
    taken = "samples" if config.packing_length is None else "rows of samples"
    pre = config.pre_of(stage)
    weights = "an adapter and " if config.lora is not None and "llm" in stage.trainable else ""
    trained = sum(sizes[part] for part in stage.trainable if not (weights and part == "llm"))
    return (
        f"stage {stage.name}: {steps:,} steps of {batch} {taken}, {weights}{trained:,} parameters "
        f"({', '.join(stage.trainable)}), learning rate {arguments.learning_rate:g}, "
        + ("no PRe" if pre is None else f"PRe {dict(pre) or 'by default'}")
    )
