# SPDX-License-Identifier: Apache-2.0
"""Patch structure: do the patches of one object still resemble each other more than others'?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prereg_kernels.checkup.measures.mean import MeanSums
from prereg_kernels.checkup.measures.tensors import (
    check_features,
    check_ids,
    check_mean,
    lengths,
    pieces,
    working,
)


class PatchStructure(NamedTuple):
    """Mean cosine similarities between patches (arXiv 2603.20808, patch-structure degradation).

    A component that all patches share raises both alike and squeezes the contrast towards 1; the
    centred values are those after the mean patch was subtracted. Numbers, or arrays of them.
    """

    cohesion: float  # over pairs of distinct patches of the same object
    coupling: float  # over pairs of patches of two different objects
    centred_cohesion: float = math.nan
    centred_coupling: float = math.nan

    @classmethod
    def of(cls, sums: Mapping[str, Any]) -> PatchStructure:
        """From arrays of sums of similarities, by the fields' names, over the numbers of pairs
        "within" objects and "between" them."""
        pairs = (sums["within"], sums["between"]) * 2
        return cls(*(_ratio(sums[name], n) for name, n in zip(cls._fields, pairs, strict=True)))

    @property
    def contrast(self) -> float:
        """cohesion / coupling. It explodes where coupling is near 0: look at both as well."""
        return _ratio(self.cohesion, self.coupling)

    @property
    def difference(self) -> float:
        """cohesion - coupling."""
        return self.cohesion - self.coupling

    @property
    def centred_contrast(self) -> float:
        """centred_cohesion / centred_coupling: the coupling is often near 0, or negative."""
        return _ratio(self.centred_cohesion, self.centred_coupling)

    @property
    def centred_difference(self) -> float:
        """centred_cohesion - centred_coupling."""
        return self.centred_cohesion - self.centred_coupling


def _ratio(x: Any, y: Any) -> Any:
    """x / y, NaN where y is 0."""
    if isinstance(y, np.ndarray):
        return x / np.where(y == 0, math.nan, y)
    return x / y if y else math.nan


class StructureSums:
    """`patch_structure` of features that arrive in batches of whole images.

    No pair is formed: with f_i the normalised features and S_o their sum over object o,
    the similarities of the ordered pairs within o add up to |S_o|^2 - sum_i |f_i|^2, and those of
    all pairs of different objects of an image to |sum_o S_o|^2 - sum_o |S_o|^2.

    Args:
        mean: (D,) the mean patch that the centred values subtract, from `MeanSums`; None leaves
            those NaN.

    Raises:
        ValueError: a mean of another shape, or one that is not finite.

    Attributes:
        pairs: how many so far, within an object and between two.

    Memory: an (objects of the batch, D) table in float64; nothing grows with the batches.
    """

    def __init__(self, mean: Tensor | None = None) -> None:
        if mean is not None:
            check_mean(mean, "mean")
        self._mean = mean
        self.pairs = [0, 0]
        self._similarity = [[0.0, 0.0], [0.0, 0.0]]  # as they are, centred

    @torch.no_grad()
    def update(
        self, features: Tensor, objects: Tensor, images: Tensor | None = None
    ) -> StructureSums:
        """Add a batch; the arguments are those of `patch_structure`.

        Image ids tell the images of this batch apart, so no image may be split over two batches.
        """
        columns = None if self._mean is None else len(self._mean)
        check_features(features, columns=columns)
        check_ids(objects, "objects", len(features))
        if images is None:
            images = torch.zeros_like(objects)
        check_ids(images, "images", len(features))
        objects, images = objects.to(features.device), images.to(features.device)

        rows = (objects >= 0).nonzero().squeeze(1)
        pairs = torch.stack([images[rows], objects[rows]], dim=1)
        groups, group = torch.unique(pairs, dim=0, return_inverse=True)  # an object of an image
        ids, image = torch.unique(groups[:, 0], return_inverse=True)
        sizes = torch.bincount(group, minlength=len(groups))
        image_sizes = torch.zeros_like(ids).index_add_(0, image, sizes)
        within = int((sizes * (sizes - 1)).sum())
        self.pairs[0] += within
        self.pairs[1] += int((image_sizes * (image_sizes - 1)).sum()) - within

        for centred in (False, True) if self._mean is not None else (False,):
            sums, own = self._object_sums(centred, features, rows, group, len(groups))
            squares = float(sums.square().sum())
            image_sums = sums.new_zeros(len(ids), sums.shape[1]).index_add_(0, image, sums)
            self._similarity[centred][0] += squares - own
            self._similarity[centred][1] += float(image_sums.square().sum()) - squares
        return self

    def _object_sums(
        self, centred: bool, features: Tensor, rows: Tensor, group: Tensor, count: int
    ) -> tuple[Tensor, int]:
        """(count, D) float64 sums of the normalised rows, and how many of these are not 0."""
        sums = features.new_zeros(count, features.shape[1], dtype=torch.float64)
        own = 0
        for part in pieces(len(rows), features.shape[1]):
            (x,) = working(features[rows[part]])
            length = lengths(x)
            if centred:
                assert self._mean is not None
                x -= self._mean.to(x)
                length = lengths(x, length)
            own += int(length.isfinite().sum())  # each similar to itself by 1
            sums.index_add_(0, group[part], x.div_(length[:, None]).double())
        return sums, own

    def result(self) -> PatchStructure:
        """Means over all pairs so far, pooled over objects and images; NaN where there is none."""
        values = [
            total / pairs if pairs else math.nan
            for totals in self._similarity
            for total, pairs in zip(totals, self.pairs, strict=True)
        ]
        return PatchStructure(*(values if self._mean is not None else values[:2]))


def patch_structure(
    features: Tensor, objects: Tensor, images: Tensor | None = None
) -> PatchStructure:
    """Cohesion and coupling of patch features, as they are and with their mean subtracted.

    Args:
        features: (N, D), any floating dtype. The centred values subtract the mean of all N rows.
            A row without a direction, 0 or equal to that mean, has similarity 0 to every other.
        objects: (N,) integer object ids; -1 is background, left out of the pairs.
        images: (N,) integer image ids: pairs are formed within an image only, and object ids
            distinguish objects within an image. None: all patches are of one image.

    Returns:
        Means over all pairs, pooled over objects and images; NaN where there is no such pair.

    Raises:
        ValueError: shapes that do not fit, or features that are not finite.

    Example:
        >>> from prereg_kernels.checkup import patch_structure
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> found = patch_structure(features, torch.tensor([0, 0, 1, 1]))
        >>> round(found.cohesion, 6), round(found.coupling, 6)
        (1.0, 0.0)
    """
    mean = MeanSums().update(features).result()
    return StructureSums(mean).update(features, objects, images).result()
