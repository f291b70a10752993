# SPDX-License-Identifier: Apache-2.0
"""The bank of digit glyphs: scikit-learn's handwritten digits, rendered once in every variant.

Composing a scene is then a lookup. A variant is tilt x stroke thickness x tile size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "test")
TILTS = ("backward", "upright", "forward")
THICKNESSES = ("thin", "thick")

TILT_DEGREES = 22.0
TEST_FRACTION = 0.3
_SPLIT_SEED = 20260320
# A stroke is where the interpolated scan exceeds a level: a high level leaves its thin core.
_THICKNESS_LEVELS = (0.45, 0.15)
_EDGE = 0.3


@dataclass(frozen=True)
class GlyphBank:
    """All variants of all scans.

    Attributes:
        glyphs: (scans, tilts, thicknesses, sizes, S, S) uint8 ink, 255 = full; a tile of side
            s < S fills the upper left corner.
        labels: (scans,) digit class of each scan.
        sizes: tile sides in px, ascending; the last is S.
    """

    glyphs: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sizes: tuple[int, ...]


@lru_cache(maxsize=1)
def load_scans() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The scans: (1797, 8, 8) ink in [0, 1] and their (1797,) classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16.0, data.target.astype(np.int64)


@lru_cache(maxsize=2)
def scans_of_split(split: str) -> tuple[NDArray[np.int64], ...]:
    """Scan indices of a split, one array per class. The splits share no scan.

    Raises:
        ValueError: `split` is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    _, labels = load_scans()
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for digit in range(10):
        scans = rng.permutation(np.flatnonzero(labels == digit))
        n_test = round(TEST_FRACTION * len(scans))
        chosen.append(np.sort(scans[:n_test] if split == "test" else scans[n_test:]))
    return tuple(chosen)


def _sampling_matrix(size: int, degrees: float) -> NDArray[np.float64]:
    """(64, size * size): bilinear weights that draw a rotated 8 x 8 scan on a size x size tile."""
    # One and a half px of margin keep the strokes off the tile's edge.
    scale = (size - 3.0) / 8.0
    angle = np.deg2rad(degrees)
    y, x = (np.indices((size, size)) - (size - 1) / 2.0) / scale
    source_y = (np.cos(angle) * y + np.sin(angle) * x + 3.5).ravel()
    source_x = (np.cos(angle) * x - np.sin(angle) * y + 3.5).ravel()
    grid = np.arange(8)
    weight_y = np.clip(1.0 - np.abs(source_y - grid[:, None]), 0.0, 1.0)
    weight_x = np.clip(1.0 - np.abs(source_x - grid[:, None]), 0.0, 1.0)
    return (weight_y[:, None, :] * weight_x[None, :, :]).reshape(64, -1)


@lru_cache(maxsize=4)
def glyph_bank(sizes: tuple[int, ...]) -> GlyphBank:
    """Render every scan in every tilt, thickness and tile size (a fraction of a second, cached)."""
    images, labels = load_scans()
    flat = images.reshape(len(images), 64)
    side = max(sizes)
    shape = (len(images), len(TILTS), len(THICKNESSES), len(sizes), side, side)
    glyphs = np.zeros(shape, dtype=np.uint8)
    for t, degrees in enumerate((-TILT_DEGREES, 0.0, TILT_DEGREES)):
        for s, size in enumerate(sizes):
            drawn = (flat @ _sampling_matrix(size, degrees)).reshape(-1, size, size)
            for k, level in enumerate(_THICKNESS_LEVELS):
                ink = np.clip((drawn - level) / _EDGE, 0.0, 1.0)
                glyphs[:, t, k, s, :size, :size] = np.round(255.0 * ink).astype(np.uint8)
    return GlyphBank(glyphs=glyphs, labels=labels, sizes=tuple(sizes))
