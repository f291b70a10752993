"""Patch structure: do the patches of one object still resemble each other more than others'?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PatchStructure(NamedTuple):
    """Mean cosine similarities between patches (arXiv 2603.20808, patch-structure degradation)."""

    cohesion: float  # over pairs of distinct patches of the same object
    coupling: float  # over pairs of patches of two different objects

    @property
    def contrast(self) -> float:
        """cohesion / coupling. It explodes where coupling is near 0: look at both as well."""
        return self.cohesion / self.coupling if self.coupling else float("nan")

    @property
    def difference(self) -> float:
        """cohesion - coupling."""
        return self.cohesion - self.coupling


def patch_structure(
    features: Tensor, objects: Tensor, images: Tensor | None = None
) -> PatchStructure:
    """Cohesion and coupling of patch features.

    No pair is formed: with f_i the normalised features and S_o their sum over object o,
    the similarities of the ordered pairs within o add up to |S_o|^2 - n_o, and those of all pairs
    of different objects to |sum_o S_o|^2 - sum_o |S_o|^2.

    Args:
        features: (N, D), any floating dtype. A row of zeros has similarity 0 to every other.
        objects: (N,) integer object ids; -1 is background, left out.
        images: (N,) integer image ids: pairs are formed within an image only, and object ids
            distinguish objects within an image. None: all patches are of one image.

    Returns:
        Means over all pairs, pooled over objects and images; NaN where there is no such pair.

    Raises:
        ValueError: shapes that do not fit, or features that are not finite.
    """
    if features.dim() != 2:
        raise ValueError(f"features: expected shape (N, D), got {tuple(features.shape)}")
    for name, ids in (("objects", objects), ("images", images)):
        if ids is not None and tuple(ids.shape) != features.shape[:1]:
            expected = (features.shape[0],)
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(ids.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features: expected finite values, got NaN or infinity")
    keep = objects >= 0
    x = features[keep].double()
    x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-300)
    image_ids = torch.zeros_like(objects) if images is None else images
    pairs = torch.stack([image_ids[keep], objects[keep]], dim=1)
    groups, group = torch.unique(pairs, dim=0, return_inverse=True)  # an object of an image
    _, image = torch.unique(groups[:, 0], return_inverse=True)

    sizes = torch.bincount(group, minlength=len(groups)).double()
    sums = x.new_zeros(len(groups), x.shape[1]).index_add_(0, group, x)
    squares = sums.square().sum(dim=1)
    own = x.square().sum()  # each patch with itself: 1, or 0 for a row of zeros

    count = int(image.max()) + 1 if len(groups) else 0
    image_sums = sums.new_zeros(count, x.shape[1]).index_add_(0, image, sums)
    image_sizes = sizes.new_zeros(count).index_add_(0, image, sizes)
    within = (squares.sum() - own, (sizes * (sizes - 1)).sum())
    between = (
        image_sums.square().sum() - squares.sum(),
        image_sizes.square().sum() - sizes.square().sum(),
    )
    return PatchStructure(*(float(total / pairs) for total, pairs in (within, between)))
