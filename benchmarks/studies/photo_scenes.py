# SPDX-License-Identifier: Apache-2.0
"""The demo's scenes with crops of photographs in place of digits.

A tile is a crop of a photograph, turned so that its edges run in one of ten directions. That
direction is the class that questions ask for. What a digit has as attributes, a crop has too, by
other means (`MEANS`). The photographs are those that scikit-image, scikit-learn and matplotlib
install, and the splits share none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import sklearn
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, rotate

from prereg_kernels.demo.data.draws import Draws
from prereg_kernels.demo.data.scenes import SceneConfig, Scenes

PHOTOGRAPHS = {
    "train": (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coins.png",
        "grass.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
        "page.png", "retina.jpg", "china.jpg",
    ),
    "test": (
        "coffee.png", "gravel.png", "rocket.jpg", "text.png", "flower.jpg", "grace_hopper.jpg",
    ),
}  # fmt: skip
MEANS = {
    "digit": "direction of the edges",
    "polarity": "bright or dark",
    "tilt": "lit from the left, evenly, from the right",
    "texture": "sharp, blurred, grainy",
    "thickness": "low or high contrast",
}
"""The scenes' names of properties, and what stands for them here, in class order."""

_FOLDERS = (
    Path(skimage.__file__).parent / "data",
    Path(sklearn.__file__).parent / "datasets" / "images",
    Path(matplotlib.__file__).parent / "mpl-data" / "sample_data",
)
CROPS = 40  # of a photograph
WINDOW = 48  # px of a photograph that a crop is cut from
TRIES = 4000
COHERENCE = 0.4  # of the edges' directions in a crop, 0 (all alike) to 1 (one alone)
CONTRAST = 12.0  # of 255: the least deviation of a crop's pixels
_LEVELS = (0.62, 0.38)
_LIGHT = 0.12  # at a tile's edge, on top of its middle's
_DEVIATIONS = (0.10, 0.20)
_BLUR, _GRAIN = 1.2, 0.06


@dataclass(frozen=True)
class PhotoConfig(SceneConfig):
    """What such a scene looks like; the name tells its settings from those of digits."""

    things: str = "photographs"

    def open(self, split: str, seed: int = 0) -> Scenes:
        """The scenes of a split."""
        return PhotoScenes(split, seed, self)


def direction(crop: NDArray[np.float64]) -> tuple[float, float]:
    """Of a crop's edges: their direction in degrees, in [0, 180), and its coherence, by the
    structure tensor within the largest circle."""
    gy, gx = np.gradient(gaussian_filter(crop, 1.0))
    side = len(crop)
    y, x = np.indices((side, side)) - (side - 1) / 2
    inside = y**2 + x**2 <= (side / 2 - 1) ** 2
    xx, yy, xy = (float((a * b)[inside].sum()) for a, b in ((gx, gx), (gy, gy), (gx, gy)))
    angle = np.rad2deg(np.arctan2(2 * xy, xx - yy)) / 2  # of the steepest ascent
    return float(angle + 90) % 180, float(np.hypot(xx - yy, 2 * xy) / max(xx + yy, 1e-9))


def read_photograph(name: str) -> NDArray[np.float64]:
    """(H, W) grey, in [0, 255]."""
    [path] = [folder / name for folder in _FOLDERS if (folder / name).exists()]
    return np.asarray(Image.open(path).convert("L"), dtype=np.float64)


def _turned(photograph: NDArray[np.float64], y: int, x: int, degrees: float) -> NDArray[np.float64]:
    """The (WINDOW, WINDOW) crop about a point, turned against the clock."""
    reach = WINDOW * 3 // 4  # more than half of the diagonal
    around = photograph[y - reach : y + reach, x - reach : x + reach]
    margin = reach - WINDOW // 2
    return rotate(around, degrees, reshape=False, order=1)[margin:-margin, margin:-margin]


@lru_cache(maxsize=2)
def crop_bank(split: str, side: int) -> NDArray[np.float32]:
    """Crops of the split's photographs: (crops, 10 directions, side, side), each with mean 0 and
    deviation 1. (A few seconds, cached.)"""
    found = []
    for number, name in enumerate(PHOTOGRAPHS[split]):
        photograph = read_photograph(name)
        rng = np.random.default_rng([number, len(split)])
        reach, taken = WINDOW * 3 // 4, 0
        for _ in range(TRIES):
            y, x = (int(rng.integers(reach, size - reach)) for size in photograph.shape)
            crop = _turned(photograph, y, x, 0.0)
            angle, coherence = direction(crop)
            if coherence < COHERENCE or crop.std() < CONTRAST:
                continue
            # Rows count downwards, so a direction falls as a crop is turned against the clock
            turned = [_turned(photograph, y, x, angle - 18.0 * k) for k in range(10)]
            found.append([_small(crop, side) for crop in turned])
            taken += 1
            if taken == CROPS:
                break
    return np.asarray(found, dtype=np.float32)


def _small(crop: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    image = Image.fromarray(crop.astype(np.float32))
    small = np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.float64)
    return (small - small.mean()) / max(small.std(), 1e-6)


class PhotoScenes(Scenes):
    """An endless, random-access set of such scenes; a crop is of any class, as it is turned."""

    def __init__(self, split: str, seed: int, config: SceneConfig) -> None:
        super().__init__(split, seed, config)
        crops = len(crop_bank(split, config.max_size))
        self._scan_counts = np.full(10, crops)
        self._scans = np.tile(np.arange(crops), (10, 1))

    def _paste(
        self,
        draws: Draws,
        images: NDArray[np.float32],
        masks: NDArray[np.int64],
        counts: NDArray[np.int64],
        fields: dict[str, NDArray[np.int64]],
    ) -> None:
        bank = crop_bank(self.split, self.config.max_size)
        side = self.config.max_size
        blurred = gaussian_filter(bank, (0, 0, _BLUR, _BLUR))
        grain = np.random.default_rng(side).standard_normal((64, side, side)).astype(np.float32)
        offset = np.arange(side)
        light = np.float32(_LIGHT) * (2 * offset / (side - 1) - 1).astype(np.float32)
        drawn = (draws.uniform(self.config.max_digits) * len(grain)).astype(np.int64)
        for k in range(self.config.max_digits):
            b = np.flatnonzero(counts > k)
            of = {name: values[b, k] for name, values in fields.items()}
            sharp, soft = (x[of["scan"], of["digit"]] for x in (bank, blurred))
            tile = np.where((of["texture"] == 1)[:, None, None], soft, sharp)
            tile = np.asarray(_DEVIATIONS, np.float32)[of["thickness"]][:, None, None] * tile
            tile += (_GRAIN * (of["texture"] == 2))[:, None, None] * grain[drawn[b, k]]
            tile += np.asarray(_LEVELS, np.float32)[of["polarity"]][:, None, None]
            tile += (1 - of["tilt"])[:, None, None] * light
            inside = offset < of["size"][:, None]
            bi, yi, xi = np.nonzero(inside[:, :, None] & inside[:, None, :])
            where = (b[bi], of["top"][bi] + yi, of["left"][bi] + xi)
            images[where] = np.clip(tile, 0.0, 1.0)[bi, yi, xi].astype(np.float32)
            masks[where] = k
