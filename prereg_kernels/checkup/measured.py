"""Everything that was measured on one model, read back from its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prereg_kernels._util.files import printable
from prereg_kernels.checkup.collect import first_pass, mean_patch, second_pass
from prereg_kernels.checkup.measures.lens import Lens
from prereg_kernels.checkup.measures.mean import MeanSums
from prereg_kernels.checkup.measures.norms import MassiveDimension, Norms
from prereg_kernels.checkup.measures.probe import NoProbeError, Probe, probe
from prereg_kernels.checkup.measures.similarity import Similarity, SimilaritySums
from prereg_kernels.checkup.measures.spectrum import Spectrum, SpectrumSums
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
        norms: (L + 1, tokens) float64, of every visual token.
        cosines: (I, L + 1) each image's mean cosine of patches to their input.
        structure: (I, L + 1, 4) each image's cohesion, coupling and both centred; pairs: (I, 2).
        skipped: {reason: names of images}.
    """

    def __init__(self, shards: Shards, count: int, splits: int) -> None:
        self._shards, self._splits = shards, splits
        facts = [shards.facts(first_pass(i)) for i in range(count)]
        self._used = [i for i in range(count) if facts[i]["images"]]
        self._facts = {i: facts[i] for i in self._used}
        self._count = count
        self.names = [name for i in self._used for name in facts[i]["images"]]
        self.skipped: dict[str, list[str]] = {}
        for found in facts:
            for name, reason in found["skipped"]:
                self.skipped.setdefault(printable(reason), []).append(printable(name))
        self.tokens = self._cat("tokens", 0).numpy()
        self.norms = self._cat("norms", 1)
        self.cosines = self._cat("cosines", 1).double().numpy().T
        self.layers = len(self.norms)
        self.structure, self.pairs = self._structure()

    @property
    def has_objects(self) -> bool:
        """Whether there are pairs of patches to compare."""
        return bool(self.pairs.any())

    @cached_property
    def sample_rows(self) -> int:
        """Patches that the spectrum and CKA are computed from."""
        return int(self._layer("sample", 0).shape[0])

    @cached_property
    def width(self) -> int:
        """D."""
        return int(self._layer("sample", 0).shape[1])

    def spectra(self, done: Callable[[], None]) -> list[tuple[Spectrum, Similarity]]:
        """Of each layer's sample. Holds three (D, D) matrices: layer 0's, a layer's, theirs."""
        first = self._layer("sample", 0)
        first_mean, first_sums = MeanSums().update(first).result(), SpectrumSums().update(first)
        found = []
        for depth in range(self.layers):
            x, mean, sums = first, first_mean, first_sums
            if depth:
                x = self._layer("sample", depth)
                mean, sums = MeanSums().update(x).result(), SpectrumSums().update(x)
            similar = SimilaritySums((mean, first_mean)).update(x, first).result(sums, first_sums)
            found.append((sums.result(), similar))
            done()
        return found

    def probes(self, done: Callable[[], None]) -> tuple[dict[str, list[Probe]], dict[str, str]]:
        """{target: one probe a layer}, and {target: why there is none}.

        Targets are "image: ..." (a row an image) and "object: ..." (a row an object).
        """
        found: dict[str, list[Probe]] = {}
        missing: dict[str, str] = {}
        for level, tensor in (("image", "image_means"), ("object", "object_means")):
            labels, owners = self._labels(level)
            for target in dict.fromkeys(name for row in labels for name in row):
                name = f"{level}: {target}"
                rows = [i for i, row in enumerate(labels) if target in row]
                classes = sorted({labels[i][target] for i in rows})
                y = torch.tensor([classes.index(labels[i][target]) for i in rows])
                groups = torch.tensor([owners[i] for i in rows])
                try:
                    found[name] = []
                    for depth in range(self.layers):
                        x = self._layer(tensor, depth)[rows]
                        found[name].append(
                            probe(x, y, groups=groups, splits=self._splits, test_share=TEST_SHARE)
                        )
                        done()
                except NoProbeError as error:
                    del found[name]
                    missing[name] = str(error)
        return found, missing

    def unlabelled(self) -> list[str]:
        """What is left out of a probe for want of a label, in sentences."""
        found = []
        for level in ("image", "object"):
            labels, _ = self._labels(level)
            for target in dict.fromkeys(name for row in labels for name in row):
                count = sum(target in row for row in labels)
                if count < len(labels):
                    found.append(
                        f"Only {count} of {len(labels)} {level}s have a label of {target}: the "
                        f"probe of {level}: {target} leaves the others out."
                    )
        return found

    def lenses(self) -> list[Lens]:
        """The logit lens at each layer."""
        counts: list[Counter[int]] = [Counter() for _ in range(self.layers)]
        for i in self._used:
            for depth, token, times in self._shards.read(first_pass(i), "top").tolist():
                counts[depth][token] += times
        return [Lens.of(times) for times in counts]

    def token_norms(self) -> list[Norms]:
        """Norms of all tokens at each layer, and their massive activations."""
        found = []
        for depth, norms in enumerate(self.norms):
            massive = [self._facts[i]["massive"][depth] for i in self._used]
            dimensions = [MassiveDimension(*one) for _, several in massive for one in several]
            found.append(Norms.of(norms, sum(tokens for tokens, _ in massive), dimensions))
        return found

    def shown(self) -> list[Shown]:
        """The images of the page."""
        return [
            self._shown(first_pass(i), b, self._facts[i]["images"][b])
            for i in self._used
            for b in self._facts[i]["shown"]
        ]

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

    def _structure(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        parts, pairs = [], []
        for i in self._used:
            if self._facts[i]["objects"]:
                parts.append(self._shards.read(second_pass(i), "structure").movedim(0, 1))
                pairs.append(self._shards.read(second_pass(i), "pairs"))
            else:
                images = len(self._facts[i]["images"])
                parts.append(torch.zeros(images, self.layers, 4, dtype=torch.float64))
                pairs.append(torch.zeros(images, 2, dtype=torch.float64))
        return torch.cat(parts).numpy(), torch.cat(pairs).numpy()

    def _shown(self, shard: str, b: int, name: str) -> Shown:
        found = {}
        for what in ("picture", "boxes", "places", "grid", "objects"):
            tensor = self._shards.get(shard, f"{what}_{b}")
            found[what] = None if tensor is None else tensor.numpy()
        grid = found.pop("grid")
        shape = None if grid is None else (int(grid[0]), int(grid[1]))
        return Shown(printable(name), self._shards.read(shard, f"patches_{b}"), grid=shape, **found)

    def _cat(self, tensor: str, dim: int) -> Tensor:
        return torch.cat([self._shards.read(first_pass(i), tensor) for i in self._used], dim=dim)

    def _layer(self, tensor: str, depth: int) -> Tensor:
        return torch.cat([self._shards.layer(first_pass(i), tensor, depth) for i in self._used])
