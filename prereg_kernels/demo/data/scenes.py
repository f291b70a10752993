# SPDX-License-Identifier: Apache-2.0
"""Scenes of real handwritten digits, with an exact object mask.

A scene is a grey canvas with faint clutter and a few tiles. Each tile holds one scan and four
attributes beside its class: polarity, tilt, background texture and stroke thickness. The tiles are
jittered about their grid cells, so that the patches of a vision tower do not coincide with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from prereg_kernels._util.settings import check_numbers
from prereg_kernels.demo.data.draws import Draws, stream_key
from prereg_kernels.demo.data.glyphs import (
    SPLITS,
    THICKNESSES,
    TILTS,
    GlyphBank,
    glyph_bank,
    scans_of_split,
)

POLARITIES = ("light", "dark")
TEXTURES = ("plain", "striped", "dotted")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "polarity": POLARITIES,
    "tilt": TILTS,
    "texture": TEXTURES,
    "thickness": THICKNESSES,
}
"""The attributes that the common questions never ask for, and their values in class order."""

PROPERTIES = ("digit", *ATTRIBUTES)
"""What the probes read: the class that questions ask for, then the attributes that none does."""

_CANVAS = 512


@dataclass(frozen=True)
class SceneConfig:
    """What a scene looks like. Lengths in px.

    Attributes:
        image_size: side of the square image.
        grid: cells per side.
        patch_size: side of a patch; must divide `image_size`.
        min_digits: fewest digits in a scene, whose number is drawn uniformly.
        max_digits: most digits in a scene.
        min_size: smallest side of a digit's tile.
        max_size: largest side of a digit's tile.
        jitter: largest displacement of a tile from the centre of its cell, per axis.
        classes_per_scene: a scene draws its digits from so many classes, so that counts exceed 1.
        clutter: strength of the strokes and dots that belong to no object, in [0, 1].
        noise: standard deviation of the pixel noise.
        purity: share of a patch's pixels that one object must own for the patch to bear its id.
    """

    image_size: int = 48
    grid: int = 3
    patch_size: int = 8
    min_digits: int = 2
    max_digits: int = 7
    min_size: int = 14
    max_size: int = 16
    jitter: int = 2
    classes_per_scene: int = 4
    clutter: float = 0.5
    noise: float = 0.03
    purity: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self)
        cell = self.image_size // self.grid if self.grid > 0 else 0
        rules = (
            ("grid", self.grid >= 1, "at least 1"),
            ("patch_size", 1 <= self.patch_size <= self.image_size, "between 1 and image_size"),
            ("image_size", self.image_size % max(self.patch_size, 1) == 0, "patch_size's multiple"),
            ("image_size", self.image_size <= _CANVAS, f"at most {_CANVAS}"),
            ("min_digits", self.min_digits >= 1, "at least 1"),
            ("max_digits", self.min_digits <= self.max_digits, "at least min_digits"),
            ("max_digits", self.max_digits <= self.grid**2, "at most grid**2"),
            ("min_size", self.min_size >= 8, "at least 8, the side of a scan"),
            ("max_size", self.min_size <= self.max_size <= cell, f"min_size to {cell}, a cell"),
            ("jitter", 0 <= self.jitter <= cell // 4, f"between 0 and {cell // 4}, a quarter cell"),
            ("classes_per_scene", 1 <= self.classes_per_scene <= 10, "between 1 and 10"),
            ("clutter", 0.0 <= self.clutter <= 1.0, "between 0 and 1"),
            ("noise", 0.0 <= self.noise <= 0.5, "between 0 and 0.5"),
            ("purity", 0.0 < self.purity <= 1.0, "in (0, 1]"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def patches(self) -> int:
        """Patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def sizes(self) -> tuple[int, ...]:
        """All tile sides, ascending."""
        return tuple(range(self.min_size, self.max_size + 1))

    def open(self, split: str, seed: int = 0) -> Scenes:
        """The scenes of a split that look like this; a subclass has scenes of another kind."""
        return Scenes(split, seed, self)


@dataclass(frozen=True)
class SceneObject:
    """One digit: its cell (row-major), class, attributes (indices into `ATTRIBUTES`), its scan (an
    index into load_digits) and its tile (`top`, `left`, `size`, px)."""

    cell: int
    digit: int
    polarity: int
    tilt: int
    texture: int
    thickness: int
    scan: int
    top: int
    left: int
    size: int


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        image: (H, W) float32 in [0, 1].
        mask: (H, W) int64: the index into `objects` of the object a pixel shows, -1 = background.
        patch_objects: (P,) int64, row-major: the index of the object that owns the patch, or -1.
        objects: the digits in drawing order; a later tile covers an earlier one.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.int64]
    patch_objects: NDArray[np.int64]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class SceneBatch:
    """B scenes as arrays. Slots k >= counts[b] of the (B, K) arrays are unused and hold -1.

    Attributes:
        images: (B, H, W) float32 in [0, 1].
        masks: (B, H, W) int64 slot per pixel, -1 = background.
        patch_objects: (B, P) int64 slot per patch, -1 = background or mixed.
        counts: (B,) int64 digits in each scene.
        fields: {"cell", "digit", "polarity", "tilt", "texture", "thickness", "scan", "top", "left",
            "size"}: (B, K) int64 each.
    """

    images: NDArray[np.float32]
    masks: NDArray[np.int64]
    patch_objects: NDArray[np.int64]
    counts: NDArray[np.int64]
    fields: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def scenes(self) -> tuple[Scene, ...]:
        """The same, one by one."""
        columns = {name: values.tolist() for name, values in self.fields.items()}
        found = []
        for b, count in enumerate(self.counts.tolist()):
            objects = tuple(
                SceneObject(**{name: values[b][k] for name, values in columns.items()})
                for k in range(count)
            )
            found.append(Scene(self.images[b], self.masks[b], self.patch_objects[b], objects))
        return tuple(found)


@lru_cache(maxsize=4)
def _clutter_canvases(split: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two (512, 512) canvases to crop windows from: strokes and dots in [-1, 1]; unit noise."""
    rng = np.random.default_rng(stream_key("clutter", split))
    clutter = np.zeros((_CANVAS, _CANVAS), dtype=np.float32)
    for _ in range(1400):
        y, x = rng.uniform(0, _CANVAS, size=2)
        angle, bend = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.12)
        steps = int(rng.choice((1, 4, 7, 10)))  # a dot, or a stroke of so many px
        value = rng.uniform(0.3, 1.0) * rng.choice((-1.0, 1.0))
        for _ in range(steps):
            clutter[int(y) % _CANVAS, int(x) % _CANVAS] = value
            y, x, angle = y + np.sin(angle), x + np.cos(angle), angle + bend
    noise = rng.standard_normal((_CANVAS, _CANVAS)).astype(np.float32)
    return clutter, noise


def _textures(side: int) -> NDArray[np.float32]:
    """(textures, side, side) patterns in {0, 1}: plain, striped, dotted."""
    y, x = np.indices((side, side))
    return np.stack([0 * y, (y // 2) % 2, (y % 4 < 2) & (x % 4 < 2)]).astype(np.float32)


def patch_owners(masks: NDArray[np.int64], patch_size: int, purity: float) -> NDArray[np.int64]:
    """The object of each patch: the one that owns most of its pixels, where that is at least
    `purity` of them.

    Args:
        masks: (B, H, W) slots, -1 = background.

    Returns:
        (B, P) slots, row-major, -1 where no object owns enough.
    """
    B, H, W = masks.shape
    rows, columns = H // patch_size, W // patch_size
    pixels = masks.reshape(B, rows, patch_size, columns, patch_size).transpose(0, 1, 3, 2, 4)
    pixels = pixels.reshape(B, rows * columns, patch_size**2)
    slots = int(masks.max(initial=0)) + 1
    owned = np.stack([(pixels == slot).sum(axis=2) for slot in range(slots)], axis=2)
    best = owned.argmax(axis=2)
    enough = owned.max(axis=2) >= purity * patch_size**2
    return np.where(enough, best, -1).astype(np.int64)


class Scenes:
    """An endless, random-access set of scenes: scene i depends on (split, seed, config, i) alone.

    Args:
        split: "train" or "test"; they share no scan.
        seed: non-negative; another seed is another set.
        config: what a scene looks like.

    Raises:
        ValueError: unknown split or negative seed.
    """

    def __init__(self, split: str, seed: int = 0, config: SceneConfig | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed!r}")
        self.split, self.seed = split, seed
        self.config = config if config is not None else SceneConfig()
        self._key = stream_key("scenes", split, seed)
        by_class = scans_of_split(split)
        self._scan_counts = np.array([len(scans) for scans in by_class])
        self._scans = np.zeros((10, self._scan_counts.max()), dtype=np.int64)
        for digit, scans in enumerate(by_class):
            self._scans[digit, : len(scans)] = scans

    def scene(self, index: int) -> Scene:
        """Scene `index` (non-negative)."""
        return self.batch([index]).scenes[0]

    def batch(self, indices: Sequence[int]) -> SceneBatch:
        """The scenes at `indices` (non-negative), each exactly as `scene` gives it.

        Raises:
            IndexError: a negative index.
        """
        index = np.asarray(indices, dtype=np.int64)
        if index.size and index.min() < 0:
            raise IndexError(f"indices: expected non-negative integers, got {int(index.min())}")
        draws = Draws(self._key, index)
        counts, fields = self._draw_objects(draws)
        images = self._draw_background(draws)
        masks = np.full(images.shape, -1, dtype=np.int64)
        self._paste(draws, images, masks, counts, fields)
        unused = np.arange(self.config.max_digits) >= counts[:, None]
        fields = {name: np.where(unused, -1, values) for name, values in fields.items()}
        owners = patch_owners(masks, self.config.patch_size, self.config.purity)
        return SceneBatch(images, masks, owners, counts, fields)

    def _draw_objects(self, draws: Draws) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
        """What is in each scene, and where: counts (B,) and the (B, K) fields."""
        cfg = self.config
        K = cfg.max_digits
        counts = draws.integers(cfg.min_digits, cfg.max_digits, 1)[:, 0]
        cell = draws.permutation(cfg.grid**2)[:, :K]
        classes = draws.permutation(10)[:, : cfg.classes_per_scene]
        digit = np.take_along_axis(classes, draws.integers(0, cfg.classes_per_scene - 1, K), axis=1)
        scan = self._scans[digit, (draws.uniform(K) * self._scan_counts[digit]).astype(np.int64)]
        fields = {"cell": cell, "digit": digit}
        for name, values in ATTRIBUTES.items():
            fields[name] = draws.integers(0, len(values) - 1, K)
        size = draws.integers(cfg.min_size, cfg.max_size, K)
        fields["scan"] = scan
        for name, cell_index in (("top", cell // cfg.grid), ("left", cell % cfg.grid)):
            centre = (cell_index + 0.5) * cfg.image_size / cfg.grid
            start = np.floor(centre - size / 2).astype(np.int64)
            moved = start + draws.integers(-cfg.jitter, cfg.jitter, K)
            fields[name] = np.clip(moved, 0, cfg.image_size - size)
        fields["size"] = size
        return counts, fields

    def _draw_background(self, draws: Draws) -> NDArray[np.float32]:
        """(B, H, W) grey canvases with clutter and noise."""
        cfg = self.config
        window = np.arange(cfg.image_size)
        corner = draws.integers(0, _CANVAS - cfg.image_size, 4)[:, :, None] + window
        clutter, noise = _clutter_canvases(self.split)
        grey = (0.42 + 0.16 * draws.uniform(1)).astype(np.float32)[:, :, None]
        images = (
            grey
            + np.float32(0.3 * cfg.clutter) * clutter[corner[:, 0, :, None], corner[:, 1, None, :]]
        )
        images += np.float32(cfg.noise) * noise[corner[:, 2, :, None], corner[:, 3, None, :]]
        return np.clip(images, 0.0, 1.0, out=images)

    def _paste(
        self,
        draws: Draws,
        images: NDArray[np.float32],
        masks: NDArray[np.int64],
        counts: NDArray[np.int64],
        fields: dict[str, NDArray[np.int64]],
    ) -> None:
        """Draw the tiles into images and masks, slot by slot, so that later slots cover earlier."""
        bank: GlyphBank = glyph_bank(self.config.sizes)
        side = self.config.max_size
        textures = _textures(side)
        contrast = (0.85 + 0.15 * draws.uniform(self.config.max_digits)).astype(np.float32)
        offset = np.arange(side)
        for k in range(self.config.max_digits):
            b = np.flatnonzero(counts > k)
            of = {name: values[b, k] for name, values in fields.items()}
            ink = bank.glyphs[
                of["scan"], of["tilt"], of["thickness"], of["size"] - self.config.min_size
            ] * np.float32(1 / 255)
            ground = 0.05 + 0.25 * textures[of["texture"]]
            tile = ground + (1.0 - ground) * ink
            tile = np.where((of["polarity"] == 1)[:, None, None], 1.0 - tile, tile)
            tile = 0.5 + (tile - 0.5) * contrast[b, k, None, None]
            inside = offset < of["size"][:, None]
            bi, yi, xi = np.nonzero(inside[:, :, None] & inside[:, None, :])
            where = (b[bi], of["top"][bi] + yi, of["left"][bi] + xi)
            images[where] = tile[bi, yi, xi].astype(np.float32)
            masks[where] = k
