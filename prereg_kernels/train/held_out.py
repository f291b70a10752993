# SPDX-License-Identifier: Apache-2.0
"""The checkup of a run in between: what the states hold of a few held-out images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from prereg_kernels.attach.family import Family
from prereg_kernels.attach.handle import get_pre
from prereg_kernels.attach.resolver import resolve
from prereg_kernels.checkup.batches import Batch
from prereg_kernels.checkup.features import visual_features, visual_mask
from prereg_kernels.checkup.images.datasets import BACKGROUND, ImageFolder, Subset
from prereg_kernels.checkup.images.datasets import Sample as Picture
from prereg_kernels.checkup.images.image_batches import ImageBatches
from prereg_kernels.checkup.images.patches import check_mask
from prereg_kernels.checkup.images.reading import SkipImage, inside, read_mask
from prereg_kernels.checkup.loading import Loaded
from prereg_kernels.checkup.measures.pooled import pool
from prereg_kernels.checkup.measures.probe import NoProbeError, probe
from prereg_kernels.checkup.measures.structure import StructureSums
from prereg_kernels.train.collator import open_image
from prereg_kernels.train.config import CheckupConfig, DataConfig
from prereg_kernels.train.order import Mixture
from prereg_kernels.train.sample import BadSampleError, Sample
from prereg_kernels.train.sources import open_source

BATCH = 8
"""Images in a forward pass."""


class Asked:
    """The images of held-out conversations; what was answered to a question is an image's class.

    Args:
        data: their source. Images are told apart by their paths; others have a sample each.
        masks: a folder with a PNG file of object numbers for each image, at its path.
        limit: images.
    """

    def __init__(self, data: DataConfig, masks: Path | None, limit: int) -> None:
        self._masks, samples = masks, Mixture([open_source(data)])
        self._images: dict[str, tuple[Any, Path | None]] = {}
        self._labels: dict[str, dict[str, str]] = {}
        for number in range(len(samples)):
            sample = samples[number]
            if not isinstance(sample, Sample) or len(sample.images) != 1:
                continue
            [image] = sample.images
            name = image if isinstance(image, str) else sample.where
            if name not in self._images and len(self._images) == limit:
                continue
            self._images[name] = image, sample.root
            self._labels.setdefault(name, {}).update(_answers(sample))
        if not self._images:
            raise ValueError(f"checkup.data: expected samples of one image each, got none: {data}")

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return list(self._images)[index]

    def label(self, index: int) -> None:
        """A question is a target of its own; there is no class of the image."""

    def fingerprint(self, indices: Sequence[int]) -> dict[str, str]:
        """Nothing is kept from one run to another."""
        return {}

    def __getitem__(self, index: int) -> Picture:
        name = self.name(index)
        try:
            image = np.asarray(open_image(*self._images[name]))
        except BadSampleError as reason:
            raise SkipImage(str(reason)) from None
        mask = None
        if self._masks is not None:
            mask = read_mask(inside(self._masks, str(Path(name).with_suffix(".png"))))
            try:
                check_mask(mask, image.shape[:2])
            except ValueError as error:
                raise SkipImage(f"mask: {error}") from None
            mask = np.where(np.isin(mask, BACKGROUND), -1, mask)
        return Picture(name, image, mask, self._labels[name])


def _answers(sample: Sample) -> Iterator[tuple[str, str]]:
    """(question, answer) of the turns of a conversation."""
    question = ""
    for message in sample.messages:
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        if message["role"] == "assistant":
            yield question.strip(), text.strip()
        question = text


class HeldOut:
    """A few images, ready for a model.

    Args:
        processor: the model's.

    Raises:
        ValueError: no images, or a model that the checkup does not know.
        OSError: a file cannot be read.
    """

    def __init__(self, config: CheckupConfig, model: nn.Module, processor: Any) -> None:
        self._model = model
        self._family: Family = resolve(model, None).family
        masks = None if config.masks is None else Path(config.masks)
        samples: Any
        if config.data is None:
            assert config.images is not None
            samples = ImageFolder(Path(config.images), masks=masks)
        else:
            source = DataConfig(config.data, config.format, config.images)
            samples = Asked(source, masks, config.limit)
        if len(samples) > config.limit:
            samples = Subset(samples, config.limit)
        loaded = Loaded(model, processor.image_processor, processor.tokenizer, ())
        batches = ImageBatches(loaded, samples, size=BATCH)
        made = [batches[number] for number in range(len(batches))]
        self._batches = [batch for batch in made if batch.images]
        if not self._batches:
            reasons = "; ".join(reason for batch in made for _, reason in batch.skipped[:1])
            raise ValueError(f"checkup: expected images that can be used, got none: {reasons}")
        self._facts = [facts for batch in self._batches for facts in batch.images]

    def layers(self) -> list[int]:
        """The LLM's input, PRe's layers or the middle one, and the last."""
        pre, count = get_pre(self._model), len(self._family.layers_of(self._model))
        middle = [max(1, count // 2)] if pre is None else list(pre.heads)
        return sorted({0, *middle, count})

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """{"checkup_probe/layer_16": ..., and cohesion and coupling, where there are masks}."""
        means: dict[int, list[Tensor]] = {layer: [] for layer in self.layers()}
        structures = {layer: StructureSums() for layer in means}
        for batch in self._batches:
            device = next(self._model.parameters()).device
            inputs = {name: x.to(device) for name, x in batch.inputs.items()}
            image = visual_mask(self._model, inputs, self._family).nonzero()[:, 0]
            features = visual_features(self._model, inputs, self._family)
            objects = _objects(batch)
            for layer, rows in means.items():
                states = features[layer].float()
                rows.append(pool(states, image)[0].cpu())
                if objects is not None:
                    structures[layer].update(states, objects, image.to(objects))
        figures: dict[str, float] = {}
        for layer, rows in means.items():
            found = {"probe": self._probe(torch.cat(rows))}
            structure = structures[layer].result()
            found |= {"cohesion": structure.cohesion, "coupling": structure.coupling}
            figures |= {f"checkup_{name}/layer_{layer}": x for name, x in found.items() if x == x}
        return figures

    def _probe(self, features: Tensor) -> float:
        """The mean accuracy over the labels that allow a probe; NaN where none does."""
        accuracies = []
        for target in dict.fromkeys(name for facts in self._facts for name in facts.labels):
            rows = [i for i, facts in enumerate(self._facts) if target in facts.labels]
            names = [self._facts[i].labels[target] for i in rows]
            classes = sorted(set(names))
            try:
                y = torch.tensor([classes.index(name) for name in names])
                accuracies.append(probe(features[rows], y).mean)
            except NoProbeError:
                continue
        return float(np.mean(accuracies)) if accuracies else float("nan")


def _objects(batch: Batch) -> Tensor | None:
    """(N,) of the batch's visual tokens, in their order; None where no mask is there."""
    if any(facts.objects is None for facts in batch.images):
        return None
    return torch.cat([torch.from_numpy(facts.objects) for facts in batch.images])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; after it, each module's mode and all random states are as before."""
    modes: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes.items():
            module.training = training


class CheckupCallback(TrainerCallback):
    """Logs the checkup before the first step, every so many, and at the end.

    Every rank measures, as some of them may hold parts of the model.
    """

    def __init__(self, trainer: Any, held_out: HeldOut, steps: int) -> None:
        self._trainer, self._held_out, self._steps = trainer, held_out, steps

    def on_train_begin(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._log()

    def on_step_end(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        if state.global_step % self._steps == 0 or state.global_step == state.max_steps:
            self._log()

    def _log(self) -> None:
        trainer = self._trainer
        with trainer.paused(), undisturbed(trainer.model), trainer.accelerator.autocast():
            figures = self._held_out.measure()
        self._trainer.log(figures)
