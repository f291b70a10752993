# SPDX-License-Identifier: Apache-2.0
"""Batches of the checkup: the model's inputs, and what is known of each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prereg_kernels.checkup.images.patches import TokenGrid


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image; everything may be missing but its name.

    Attributes:
        name: unique in the set.
        grid: the places of its N visual tokens.
        objects: (N,) int64 ids of the objects that its tokens see, -1 = background or mixed.
        labels: {target: the image's class}.
        object_labels: {target: {object id: its class}}.
        picture: (H, W, 3) uint8, for the page.
    """

    name: str
    grid: TokenGrid | None = None
    objects: NDArray[np.int64] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    object_labels: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    picture: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Batch:
    """Images for one forward of the model, one a sequence.

    Attributes:
        inputs: the model's arguments; `input_ids` has a row for each image.
        images: as many facts as rows; none where every image of the batch was skipped.
        skipped: (name, reason) of images that could not be used.
    """

    inputs: Mapping[str, Tensor]
    images: tuple[ImageFacts, ...]
    skipped: tuple[tuple[str, str], ...] = ()


class Batches(Protocol):
    """A list of batches, or what looks like one: batch i is the same whenever it is asked for.

    It may have a `fingerprint`, {what: text}, of which a text changes whenever what it stands for
    does. Without one, every batch is made once more to see whether any has changed.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...
