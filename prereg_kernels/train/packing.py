# SPDX-License-Identifier: Apache-2.0
"""Several samples in a row of tokens, none of which sees another.

A row is filled up to `packing_length` tokens by estimates, as a sample's tokens are known when it
is processed; the collator opens another row where they were too low. In a row each sample has its
own positions, from 0. Without an attention mask transformers tells the samples apart by these: by
a mask of blocks, or, with flash-attention, by their lengths in one long row.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from prereg_kernels._util import private
from prereg_kernels.train.chats import IGNORED
from prereg_kernels.train.order import GroupedSampler, Mixture
from prereg_kernels.train.sample import Sample

_WINDOW = 1000  # samples that are fitted into rows together
_PROBES = 64  # samples by which tokens are estimated


@dataclass(frozen=True)
class Estimate:
    """Tokens of a sample before it is read.

    Attributes:
        per_character, per_image: tokens.
        most: of a sample.
    """

    per_character: float
    per_image: float
    most: int

    def tokens(self, lengths: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.int64]:
        """(count,) of samples with so many characters and images."""
        found = np.ceil(self.per_character * lengths + self.per_image * images)
        return np.clip(found, 1, self.most).astype(np.int64)


def estimate(collator: Any, samples: Sequence[tuple[Sample, int, int]]) -> Estimate:
    """By some samples, (sample, characters, images) each, as the collator makes them."""
    texts, images = [0, 1], [0, 1]
    for sample, characters, count in samples[:_PROBES]:
        found = collator.count(sample)
        if found is None:
            continue
        visual, others = found
        texts = [texts[0] + others, texts[1] + characters]
        images = [images[0] + visual, images[1] + count]
    return Estimate(texts[0] / texts[1], images[0] / images[1], collator.max_length)


def probes(mixture: Mixture) -> Iterator[tuple[Sample, int, int]]:
    """Samples from all over a mixture."""
    for number in np.linspace(0, len(mixture) - 1, min(_PROBES, len(mixture)), dtype=np.int64):
        sample = mixture[int(number)]
        if isinstance(sample, Sample):
            yield sample, int(mixture.lengths[number]), int(mixture.images[number])


def fill(tokens: NDArray[np.int64], length: int) -> list[list[int]]:
    """The numbers of each row: the longest first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    for start in range(0, len(tokens), _WINDOW):
        window = tokens[start : start + _WINDOW]
        free: list[tuple[int, int]] = []  # (room, row)
        for number in np.argsort(-window, kind="stable").tolist():
            size = int(window[number])
            place = bisect_left(free, (size, -1))
            if place < len(free):
                room, row = free.pop(place)
            else:
                room, row = max(length, size), len(rows)
                rows.append([])
            rows[row].append(start + number)
            insort(free, (room - size, row))
    return rows


def fit(rows: list[list[int]], count: int) -> list[list[int]]:
    """The same samples in so many rows: the shortest are joined, or the longest halved."""
    heap = [(len(row), number, row) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > count:
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (len(a) + len(b), number, a + b))
        number += 1
    rows = [row for _, _, row in sorted(heap)]
    while len(rows) < count and len(longest := max(rows, key=len)) > 1:
        rows.remove(longest)
        rows += [longest[::2], longest[1::2]]
    return [rows[i % len(rows)] for i in range(count)]


class PackedSampler(GroupedSampler):
    """The order of an epoch, in rows: an item is a tuple of samples, all with images or none.

    Each epoch has as many rows of either kind as the first.

    Args:
        tokens: of each sample, estimated.
        length: of a row.
    """

    def __init__(
        self,
        mixture: Mixture,
        weights: Sequence[float],
        unit: int,
        seed: int,
        tokens: NDArray[np.int64],
        length: int,
    ) -> None:
        super().__init__(mixture, weights, unit, seed)
        self._tokens, self._length = tokens, length
        self._counts = [len(rows) for rows in self._kinds(self._draw(self._random(0)))]

    def __len__(self) -> int:
        return sum(map(self._whole, self._counts))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows(self._epoch))

    def rows(self, epoch: int) -> list[tuple[int, ...]]:
        """The samples of each row of an epoch."""
        random = self._random(epoch)
        units: list[list[list[int]]] = []
        for rows, count in zip(self._kinds(self._draw(random)), self._counts, strict=True):
            if rows:
                rows = fit(rows, self._whole(count))
                rows = [rows[i] for i in random.permutation(len(rows))]
                units += [rows[i : i + self.unit] for i in range(0, len(rows), self.unit)]
        return [tuple(row) for i in random.permutation(len(units)) for row in units[i]]

    def repeated(self) -> dict[str, int]:
        """As of samples."""
        images = self._mixture.images[self._draw(self._random(0))] > 0
        kinds = {"with images": int(images.sum()), "of text alone": int((~images).sum())}
        return {kind: count for kind, count in kinds.items() if 0 < count < self.unit}

    def _whole(self, count: int) -> int:
        return -(-count // self.unit) * self.unit

    def _random(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, epoch])

    def _kinds(self, drawn: NDArray[np.int64]) -> Iterator[list[list[int]]]:
        has_images = self._mixture.images[drawn] > 0
        for kind in (drawn[has_images], drawn[~has_images]):
            rows = fill(self._tokens[kind], self._length)
            yield [kind[row].tolist() for row in rows]


def order_of(
    mixture: Mixture,
    weights: Sequence[float],
    unit: int,
    seed: int,
    collator: Callable[[], Any],
    packing_length: int | None,
) -> GroupedSampler:
    """The order in which a run takes a mixture: of its samples, or of packed rows.

    Args:
        weights, unit, seed: as of GroupedSampler.
        collator: makes the one by which the tokens of samples are estimated, for rows.
    """
    if packing_length is None:
        return GroupedSampler(mixture, weights, unit, seed)
    by = estimate(collator(), list(probes(mixture)))
    tokens = by.tokens(mixture.lengths, mixture.images)
    return PackedSampler(mixture, weights, unit, seed, tokens, packing_length)


def packed(
    lengths: NDArray[np.int64],
    images: NDArray[np.int64],
    random: np.random.Generator,
    size: int,
    by: Estimate,
    length: int,
) -> list[list[int]]:
    """As `order.grouped`: the numbers of each batch, which are those of `size` rows."""
    drawn = random.permutation(len(lengths))
    tokens, batches = by.tokens(lengths, images), []
    for kind in (drawn[images[drawn] > 0], drawn[images[drawn] == 0]):
        rows = [kind[row].tolist() for row in fill(tokens[kind], length)]
        for start in range(0, len(rows), size):
            batches.append([number for row in rows[start : start + size] for number in row])
    return [batches[i] for i in random.permutation(len(batches))]


def prepare_packing(model: nn.Module, collator: Any, length: int) -> None:
    """Let the collator pack.

    The model itself is asked, as its own masks, positions and recurrent states decide.

    Raises:
        ValueError: a packed row would not give its outputs of the samples one by one.
    """
    config: Any = model.config
    attention = str(getattr(config.get_text_config(), private.ATTENTION))
    collator.row_length, collator.is_flat = length, "flash" in attention
    kind = f"packing_length: {config.model_type}"
    if "mrope_section" in str(config.to_dict()):
        raise ValueError(
            f"{kind} has positions in three dimensions, and packed rows have one; expected null"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"{kind} cannot be checked under ZeRO-3; expected null, ZeRO-2 or FSDP2")
    # transformers looks for samples in a row where there is no cache
    for part in (config, config.get_text_config()):
        part.use_cache = False
    was_training = model.training
    model.eval()
    apart, together = collator.pair()
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            one_by_one = torch.cat([_logits(model, each, device) for each in apart])
            right = _logits(model, together, device)
            mixed = {name: x for name, x in together.items() if name != "position_ids"}
            wrong = _logits(model, mixed, device)
    finally:
        model.train(was_training)
    error, distance = (float((x - one_by_one).norm()) for x in (right, wrong))
    if not error <= 0.1 * distance:
        raise ValueError(
            f"{kind} with {config.get_text_config().model_type} lets packed samples see each "
            "other, or takes no position_ids; expected null"
        )


def _logits(model: nn.Module, batch: dict[str, Any], device: torch.device) -> Tensor:
    """(tokens, vocabulary), float32, of the tokens that have a label."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    labels = batch["labels"]
    inputs = {
        name: x.to(device, dtype if x.is_floating_point() else None)
        for name, x in batch.items() if name != "labels"
    }  # fmt: skip
    logits: Tensor = model(**inputs).logits
    return logits[(labels != IGNORED).to(logits.device)].float()
