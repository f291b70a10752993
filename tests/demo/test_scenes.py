# SPDX-License-Identifier: Apache-2.0
"""Scenes: exact masks, honest splits, and a sample that depends on its address alone."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from prereg_kernels.demo.data.glyphs import glyph_bank, load_scans, scans_of_split
from prereg_kernels.demo.data.scenes import ATTRIBUTES, SceneConfig, Scenes


def test_splits_share_no_scan_and_lose_none() -> None:
    train, test = (np.concatenate(scans_of_split(split)) for split in ("train", "test"))
    assert not set(train.tolist()) & set(test.tolist())
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(1797))
    _, labels = load_scans()
    for digit in range(10):
        share = (labels[test] == digit).sum() / (labels == digit).sum()
        assert abs(share - 0.3) < 0.01


@pytest.mark.parametrize("split", ["train", "test"])
def test_objects_come_from_the_split(split: str) -> None:
    allowed = set(np.concatenate(scans_of_split(split)).tolist())
    _, labels = load_scans()
    for scene in Scenes(split, 1).batch(range(200)).scenes:
        for item in scene.objects:
            assert item.scan in allowed
            assert labels[item.scan] == item.digit


def test_masks_are_what_the_tiles_say() -> None:
    config = SceneConfig()
    for scene in Scenes("train", 3, config).batch(range(60)).scenes:
        mask = np.full((48, 48), -1)
        for k, item in enumerate(scene.objects):
            mask[item.top : item.top + item.size, item.left : item.left + item.size] = k
        assert np.array_equal(mask, scene.mask)
        for p in range(36):
            row, column = divmod(p, 6)
            patch = mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].ravel()
            owners = [k for k in range(len(scene.objects)) if (patch == k).sum() >= 32]
            best = max(owners, key=lambda k: (patch == k).sum(), default=-1)
            assert scene.patch_objects[p] == best


def test_pixels_of_a_tile_are_its_glyph() -> None:
    """The last tile is never covered, so the image shows exactly its scan, in its polarity."""
    config = SceneConfig()
    bank = glyph_bank(config.sizes)
    for scene in Scenes("test", 5, config).batch(range(60)).scenes:
        item = scene.objects[-1]
        tile = scene.image[item.top : item.top + item.size, item.left : item.left + item.size]
        glyph = bank.glyphs[item.scan, item.tilt, item.thickness, item.size - config.min_size]
        ink = glyph[: item.size, : item.size] / 255.0
        correlation = np.corrcoef(tile.ravel(), ink.ravel())[0, 1]
        assert correlation * (1 if item.polarity == 0 else -1) > 0.75


def test_a_scene_depends_on_its_address_alone() -> None:
    scenes = Scenes("train", 7)
    batch = scenes.batch([5, 10**9, 2]).scenes
    for position, index in enumerate((5, 10**9, 2)):
        alone = Scenes("train", 7).scene(index)
        assert np.array_equal(alone.image, batch[position].image)
        assert np.array_equal(alone.mask, batch[position].mask)
        assert alone.objects == batch[position].objects
    others = (scenes.scene(6), Scenes("train", 8).scene(5), Scenes("test", 7).scene(5))
    assert all(not np.array_equal(batch[0].image, other.image) for other in others)


def test_images_are_float32_in_the_unit_interval() -> None:
    images = Scenes("train", 0).batch(range(100)).images
    assert images.dtype == np.float32 and images.shape == (100, 48, 48)
    assert images.min() >= 0.0 and images.max() <= 1.0


def test_draws_are_balanced() -> None:
    batch = Scenes("train", 11).batch(range(4000))
    used = batch.fields["digit"] >= 0
    assert np.array_equal(used.sum(axis=1), batch.counts)
    for count in range(2, 8):
        assert abs((batch.counts == count).mean() - 1 / 6) < 0.03
    for name, values in {**ATTRIBUTES, "digit": range(10), "cell": range(9)}.items():
        shares = np.bincount(batch.fields[name][used], minlength=len(values)) / used.sum()
        assert np.abs(shares - 1 / len(values)).max() < 0.02, name
    # Attributes must not reveal one another: a probe of one would then read another.
    drawn = np.stack([batch.fields[name][used] for name in ATTRIBUTES])
    assert np.abs(np.corrcoef(drawn) - np.eye(len(ATTRIBUTES))).max() < 0.03


def test_every_object_owns_about_four_patches() -> None:
    batch = Scenes("train", 0).batch(range(500))
    assert 3.5 < (batch.patch_objects >= 0).sum() / batch.counts.sum() < 4.2


def test_another_geometry() -> None:
    config = SceneConfig(
        image_size=64, grid=4, patch_size=16, min_digits=1, max_digits=16, min_size=8, max_size=12
    )
    batch = Scenes("test", 2, config).batch(range(20))
    assert batch.images.shape == (20, 64, 64) and batch.patch_objects.shape == (20, 16)
    for scene in batch.scenes:
        assert len({item.cell for item in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 50),
        ("grid", 0),
        ("patch_size", 0),
        ("min_digits", 0),
        ("max_digits", 1),
        ("max_digits", 10),
        ("min_size", 4),
        ("max_size", 17),
        ("jitter", 5),
        ("classes_per_scene", 11),
        ("clutter", 1.5),
        ("noise", -0.1),
        ("purity", 0.0),
    ],
)
def test_bad_config_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field}: expected .*got"):
        replace(SceneConfig(), **{field: value})


def test_bad_addresses_are_named() -> None:
    with pytest.raises(ValueError, match=r"split: expected one of .*'valid'"):
        Scenes("valid")
    with pytest.raises(ValueError, match="seed: expected"):
        Scenes("train", -1)
    with pytest.raises(IndexError, match="indices: expected non-negative"):
        Scenes("train").scene(-1)


def test_generation_is_fast() -> None:
    scenes = Scenes("train", 0)
    scenes.batch(range(32))
    start = time.perf_counter()
    for i in range(20):
        scenes.batch(range(32 * i, 32 * i + 32))
    # Five times that on an idle core: the bound is for a busy one.
    assert 640 / (time.perf_counter() - start) > 1500
