# SPDX-License-Identifier: Apache-2.0
"""What a run trains on, in which order: a pure function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from prereg_kernels.train.collator import Failed
from prereg_kernels.train.sample import BadSampleError, Sample
from prereg_kernels.train.source import Source
from prereg_kernels.train.waiting import within

UNITS = 50
"""Steps whose samples are sorted by length together, as LLaVA does: a longer list is more even,
and less random."""


class Mixture(Dataset[Any]):
    """The samples of several sources, one after the other.

    Attributes:
        lengths: (count,) characters.
        images: (count,) images.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.lengths = np.concatenate([source.lengths for source in self.sources])
        self.images = np.concatenate([source.images for source in self.sources])
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Sample | Failed:
        [sample] = self.__getitems__([number])
        return sample

    def __getitems__(self, items: Sequence[Any]) -> list[Any]:
        """A sample for each number, or Failed where it cannot be read; a list for each tuple."""
        rows = [item if isinstance(item, tuple) else (item,) for item in items]
        places = [self._place(number) for row in rows for number in row]
        found = iter(within([partial(source.__getitem__, inside) for source, inside in places]))
        samples = (self._sample(number, next(found)) for row in rows for number in row)
        return [
            [next(samples) for _ in row] if isinstance(item, tuple) else next(samples)
            for item, row in zip(items, rows, strict=True)
        ]

    def _place(self, number: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.sources[which], int(number - self._starts[which])

    def _sample(self, number: int, found: Sample | Exception) -> Sample | Failed:
        if isinstance(found, Sample):
            return found
        if not isinstance(found, (BadSampleError, TimeoutError)):
            raise found
        source, inside = self._place(number)
        return Failed(source.where(inside), str(found), bool(self.images[number]))

    def spans(self) -> list[tuple[int, int]]:
        """The first number of each source, and the one behind its last."""
        return [(int(a), int(b)) for a, b in zip(self._starts, self._starts[1:], strict=False)]


def seed_of(arguments: Any) -> int:
    """Of the order, by TrainingArguments."""
    return int(arguments.seed if arguments.data_seed is None else arguments.data_seed)


class GroupedSampler(Sampler[Any]):
    """The order of an epoch, by units of what a step takes.

    All samples of a unit have images, or none has: the parts of the model that train are then the
    same on all ranks. They are of similar length. The last unit of either kind is filled with the
    first samples of its kind, as torch's DistributedSampler does.

    Args:
        mixture: the samples.
        weights: of its sources: how often an epoch has them.
        unit: samples of a step, on all ranks and in all micro-batches: so the order does not depend
            on how these share them.
        seed: of the order.

    Attributes:
        unit: as given.
    """

    def __init__(self, mixture: Mixture, weights: Sequence[float], unit: int, seed: int) -> None:
        self._mixture, self._weights = mixture, tuple(weights)
        self.unit, self._seed, self._epoch = unit, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.order(0))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order(self._epoch).tolist())

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The numbers of an epoch's samples."""
        random = np.random.default_rng([self._seed, epoch])
        drawn = self._draw(random)
        has_images = self._mixture.images[drawn] > 0
        units = [
            unit for kind in (drawn[has_images], drawn[~has_images]) if len(kind)
            for unit in self._units(kind)
        ]  # fmt: skip
        return np.concatenate([units[i] for i in random.permutation(len(units))])

    def repeated(self) -> dict[str, int]:
        """{kind: samples of it in an epoch}, where these are fewer than a unit."""
        has_images = self._mixture.images[self._draw(np.random.default_rng(0))] > 0
        count = int(has_images.sum())
        kinds = {"with images": count, "of text alone": len(has_images) - count}
        return {kind: count for kind, count in kinds.items() if 0 < count < self.unit}

    def _draw(self, random: np.random.Generator) -> NDArray[np.int64]:
        """An epoch's samples, shuffled; of the same number in each epoch and of each kind."""
        parts = []
        for (first, last), weight in zip(self._mixture.spans(), self._weights, strict=True):
            has_images = self._mixture.images[first:last] > 0
            for kind in (np.flatnonzero(has_images), np.flatnonzero(~has_images)):
                whole, rest = divmod(round(weight * len(kind)), max(len(kind), 1))
                parts += [kind + first] * whole
                parts.append(random.permutation(kind)[:rest] + first)
        return random.permutation(np.concatenate(parts))

    def _units(self, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        numbers = np.resize(numbers, -(-len(numbers) // self.unit) * self.unit)
        for start in range(0, len(numbers), self.unit * UNITS):
            several = numbers[start : start + self.unit * UNITS]
            by_length = several[np.argsort(self._mixture.lengths[several], kind="stable")]
            yield from by_length.reshape(-1, self.unit)


def grouped(
    lengths: NDArray[np.int64], images: NDArray[np.int64], random: np.random.Generator, size: int
) -> list[list[int]]:
    """The numbers of each batch, of `size` at most: with images in all of its samples, or in none,
    of similar length, and, of a kind, as even as they can be."""
    drawn = random.permutation(len(lengths))
    batches = []
    for kind in (drawn[images[drawn] > 0], drawn[images[drawn] == 0]):
        if len(kind):
            by_length = kind[np.argsort(lengths[kind], kind="stable")]
            batches += np.array_split(by_length, -(-len(kind) // size))
    return [batches[i].tolist() for i in random.permutation(len(batches))]
