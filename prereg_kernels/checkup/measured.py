# SPDX-License-Identifier: Apache-2.0
"""Everything that was measured on one model, read back from its shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prereg_kernels._util.files import printable
from prereg_kernels.checkup.collect import (
    Which,
    chosen,
    first_pass,
    map_of,
    mean_patch,
    second_pass,
)
from prereg_kernels.checkup.intervals import Sums
from prereg_kernels.checkup.measures.measure import Counted, PerImage, Sampled
from prereg_kernels.checkup.measures.probe import NoProbeError, Probe, probe
from prereg_kernels.checkup.shards import Shards

TEST_SHARE = 0.25
"""Of the images, in each split of a probe."""


@dataclass(frozen=True)
class Shown:
    """An image of the page: (L + 1, N, D) float32 features of all its patches, and where they are.

    `boxes`, `places` and `grid` are those of its TokenGrid (places: row and column), `objects` the
    owners of its patches; None where they are not known.
    """

    name: str
    patches: Tensor
    picture: NDArray[np.uint8] | None
    boxes: NDArray[np.float64] | None
    places: NDArray[np.int64] | None
    grid: tuple[int, int] | None
    objects: NDArray[np.int64] | None


class Measured:
    """What `collect` left of one model.

    Attributes:
        names: of the images. tokens: (I,) visual tokens of each.
        layers: L + 1, the input included.
        skipped: {reason: names of images}.
    """

    def __init__(self, shards: Shards, count: int, splits: int, shown: Which) -> None:
        self._shards, self._splits, self._which = shards, splits, shown
        facts = [shards.facts(first_pass(i)) for i in range(count)]
        self._used = [i for i in range(count) if facts[i]["images"]]
        self._facts = {i: facts[i] for i in self._used}
        self._count = count
        self.names = [name for i in self._used for name in facts[i]["images"]]
        self.skipped: dict[str, list[str]] = {}
        for of_batch in facts:
            for name, reason in of_batch["skipped"]:
                self.skipped.setdefault(printable(reason), []).append(printable(name))
        self.tokens = torch.cat([shards.read(first_pass(i), "tokens") for i in self._used]).numpy()
        self.layers = len(shards.read(first_pass(self._used[0]), "image_means"))

    @cached_property
    def sample_rows(self) -> int:
        """Patches that the spectrum and CKA are computed from."""
        return int(self._layer("sample", 0).shape[0])

    @cached_property
    def width(self) -> int:
        """D."""
        return int(self._layer("sample", 0).shape[1])

    def sums(self, source: PerImage) -> Sums | None:
        """{name: (I, L + 1)} of a source; None where no image has anything to say."""
        parts = [self._stacked(source, i) for i in self._used]
        names = next(filter(None, parts), {})
        blank = np.zeros(self.layers)
        sums = {
            name: np.concatenate(
                [
                    part[name] if part else np.tile(blank, (len(self._facts[i]["images"]), 1))
                    for i, part in zip(self._used, parts, strict=True)
                ]
            )
            for name in names
        }
        return sums if any(x.any() for x in sums.values()) else None

    def _stacked(self, source: PerImage, index: int) -> dict[str, NDArray[np.float64]]:
        """{name: (images, L + 1)} of a batch; empty where the source reads objects and none is
        there."""
        shard = (second_pass if source.objects else first_pass)(index)
        layers = self._layers(shard, source.name)
        names = layers[0] if layers else {}
        return {
            name: torch.stack([layer[name] for layer in layers], dim=1).numpy() for name in names
        }

    def records(self, source: Counted | Sampled, done: Callable[[], None]) -> list[Any]:
        """What the measures of a source read, a record a layer."""
        if isinstance(source, Counted):
            parts = [self._layers(first_pass(i), source.name) for i in self._used]
            return [source.combine(layer) for layer in zip(*parts, strict=True)]
        first = self._layer("sample", 0)
        prepared = source.prepare(first)
        records = []
        for depth in range(self.layers):
            x = self._layer("sample", depth) if depth else first
            records.append(source.compare(x, prepared))
            done()
        return records

    def _layers(self, shard: str, source: str) -> list[Mapping[str, Tensor]]:
        """A source's part of a batch at each layer; none where it is not there."""
        tensors = self._shards.starting(shard, f"{source}.")
        layers: list[dict[str, Tensor]] = [{} for _ in range(self.layers)] if tensors else []
        for name, x in tensors.items():
            key, _, depth = name.rpartition(".")
            layers[int(depth)][key] = x
        return list(layers)

    def probes(self, done: Callable[[], None]) -> tuple[dict[str, list[Probe]], dict[str, str]]:
        """{target: one probe a layer}, and {target: why there is none}.

        Targets are "image: ..." (a row an image) and "object: ..." (a row an object).
        """
        probes: dict[str, list[Probe]] = {}
        missing: dict[str, str] = {}
        for level, tensor in (("image", "image_means"), ("object", "object_means")):
            labels, owners = self._labels(level)
            for target in dict.fromkeys(name for row in labels for name in row):
                name = f"{level}: {target}"
                rows = [i for i, row in enumerate(labels) if target in row]
                classes = sorted({labels[i][target] for i in rows})
                y = torch.tensor([classes.index(labels[i][target]) for i in rows])
                groups = torch.tensor([owners[i] for i in rows])
                if len(classes) > 1 and _alone(y, groups).all():
                    missing[name] = (
                        f"each of its {len(classes)} classes is that of one image, so that no "
                        "class is in training and in test; expected several images of a class"
                    )
                    continue
                try:
                    probes[name] = []
                    for depth in range(self.layers):
                        x = self._layer(tensor, depth)[rows]
                        probes[name].append(
                            probe(x, y, groups=groups, splits=self._splits, test_share=TEST_SHARE)
                        )
                        done()
                except NoProbeError as error:
                    del probes[name]
                    missing[name] = str(error)
        return probes, missing

    def gaps(self) -> list[str]:
        """What is left out, or cannot be right, for want of labels or masks, in sentences."""
        sentences = []
        owned = bool(self._labels("object")[0])
        if not owned and not any(self._labels("image")[0]):
            sentences.append(
                "No image has a class: a folder for each class, or a file of labels, brings a "
                "probe of whole images."
            )
        if not owned:
            sentences.append(
                "No patch is known to be of an object: masks bring the contrast of patches and, "
                "where the objects have classes, a probe of objects."
            )
        for level in ("image", "object"):
            labels, owners = self._labels(level)
            for target in dict.fromkeys(name for row in labels for name in row):
                rows = [i for i, row in enumerate(labels) if target in row]
                if len(rows) < len(labels):
                    sentences.append(
                        f"Only {len(rows)} of {len(labels)} {level}s have a label of {target}: the "
                        f"probe of {level}: {target} leaves the others out."
                    )
                classes = sorted({labels[i][target] for i in rows})
                y = torch.tensor([classes.index(labels[i][target]) for i in rows])
                alone = int(_alone(y, torch.tensor([owners[i] for i in rows])).sum())
                if 0 < alone < len(rows):
                    sentences.append(
                        f"{alone} of {len(rows)} {level}s are of a {target} that no other image "
                        f"has: the probe of {level}: {target} gets these wrong."
                    )
        return sentences

    def shown(self) -> list[Shown]:
        """The images of the page, in the order in which they were asked for."""
        before, found = 0, {}
        for i in self._used:
            names = self._facts[i]["images"]
            for b in chosen(self._which, names, before):
                found[names[b]] = self._shown(map_of(i, b), names[b])
            before += len(names)
        return (
            list(found.values())
            if isinstance(self._which, int)
            else [found[name] for name in dict.fromkeys(self._which)]
        )

    def mean(self) -> Tensor:
        """(L + 1, D) the mean patch."""
        return mean_patch(self._shards, self._count)

    def sample(self, depth: int) -> Tensor:
        """(S, D) float32: patches spread over all images, the same ones at each layer."""
        return self._layer("sample", depth).float()

    def _labels(self, level: str) -> tuple[list[dict[str, str]], list[int]]:
        """The labels of each image, or object, and the number of its image."""
        labels: list[dict[str, str]] = []
        owners: list[int] = []
        before = 0
        for i in self._used:
            facts = self._facts[i]
            images = len(facts["images"])
            if level == "image":
                labels += facts["labels"]
                owners += range(before, before + images)
            else:
                labels += facts["objects"]
                owner = self._shards.read(first_pass(i), "object_owner") + before
                owners += owner.tolist()
            before += images
        return labels, owners

    def _shown(self, shard: str, name: str) -> Shown:
        facts = {}
        for what in ("picture", "boxes", "places", "grid", "objects"):
            tensor = self._shards.get(shard, what)
            facts[what] = None if tensor is None else tensor.numpy()
        grid = facts.pop("grid")
        shape = None if grid is None else (int(grid[0]), int(grid[1]))
        return Shown(printable(name), self._shards.read(shard, "patches"), grid=shape, **facts)

    def _layer(self, tensor: str, depth: int) -> Tensor:
        return torch.cat([self._shards.layer(first_pass(i), tensor, depth) for i in self._used])


def _alone(labels: Tensor, groups: Tensor) -> Tensor:
    """(N,) bool: the rows whose label (N,) is in one group (N,) alone."""
    pairs = torch.stack([labels, groups]).unique(dim=1)[0]
    return pairs.bincount()[labels] == 1
