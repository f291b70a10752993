# SPDX-License-Identifier: Apache-2.0
"""Scenes of photographs: what a tile shows is what its labels say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.studies import photo_scenes
from benchmarks.studies.demo_run import begin_from, keep_sweep
from benchmarks.studies.photo_scenes import (
    PHOTOGRAPHS,
    PhotoConfig,
    crop_bank,
    direction,
    read_photograph,
)
from benchmarks.studies.photographs import KEPT, draw_scenes, sweep_config
from prereg_kernels.demo.data.scenes import SceneBatch
from prereg_kernels.demo.sweep.sweep import open_sweep, points, steps_left


@pytest.fixture(autouse=True, scope="module")
def few_crops() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo_scenes, "CROPS", 3)
        crop_bank.cache_clear()
        yield
    crop_bank.cache_clear()


def tiles(batch: SceneBatch) -> Iterator[tuple[dict[str, int], NDArray[np.float64]]]:
    """(labels, pixels) of the tiles that no other covers."""
    for scene in batch.scenes:
        for slot, thing in enumerate(scene.objects):
            if (scene.mask == slot).sum() == thing.size**2:
                rows = slice(thing.top, thing.top + thing.size)
                columns = slice(thing.left, thing.left + thing.size)
                yield vars(thing), scene.image[rows, columns].astype(np.float64)


def test_the_splits_share_no_photograph() -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    for names in PHOTOGRAPHS.values():
        assert all(min(read_photograph(name).shape) >= 2 * 36 for name in names)


@pytest.mark.parametrize("degrees", (0.0, 30.0, 90.0, 150.0))
def test_the_direction_of_stripes(degrees: float) -> None:
    """Counter-clockwise from the horizontal, as one sees it, where rows count downwards."""
    y, x = np.indices((48, 48))
    angle = np.deg2rad(degrees)
    across = x * np.sin(angle) + y * np.cos(angle)
    found, coherence = direction(np.sin(across / 2))
    assert coherence > 0.95
    assert abs((-found - degrees + 90) % 180 - 90) < 2


@pytest.mark.parametrize("split", PHOTOGRAPHS)
def test_a_crop_is_turned_to_its_class(split: str) -> None:
    errors = [
        abs((direction(turned.astype(np.float64))[0] - 18 * k + 90) % 180 - 90)
        for crops in crop_bank(split, 16)
        for k, turned in enumerate(crops)
    ]
    assert np.median(errors) < 6  # half a class is 9


def test_tiles_are_as_their_labels_say() -> None:
    scenes = PhotoConfig(min_digits=9, max_digits=9, noise=0.0).open("test", 3)
    found = list(tiles(scenes.batch(range(40))))
    assert len(found) > 80

    def mean(of: str, value: int, measure: object) -> float:
        assert callable(measure)
        return float(np.mean([measure(pixels) for labels, pixels in found if labels[of] == value]))

    def slope(pixels: NDArray[np.float64]) -> float:
        half = pixels.shape[1] // 2
        return float(pixels[:, -half:].mean() - pixels[:, :half].mean())

    def edges(pixels: NDArray[np.float64]) -> float:
        fine = pixels - (np.roll(pixels, 1, 0) + np.roll(pixels, 1, 1)) / 2
        return float(fine[1:, 1:].std() / pixels.std())

    assert mean("polarity", 0, np.mean) > 0.55 > 0.45 > mean("polarity", 1, np.mean)
    assert mean("thickness", 1, np.std) > 1.3 * mean("thickness", 0, np.std)
    lit = [mean("tilt", value, slope) for value in range(3)]
    assert lit[0] > lit[1] + 0.05 and lit[1] > lit[2] + 0.05
    sharp, blurred, grainy = (mean("texture", value, edges) for value in range(3))
    assert blurred < sharp < grainy


def test_a_scene_depends_on_its_number_alone() -> None:
    scenes = PhotoConfig().open("train", 5)
    whole, part = scenes.batch(range(4)), PhotoConfig().open("train", 5).batch([2])
    np.testing.assert_array_equal(whole.images[2], part.images[0])
    assert whole.scenes[2].objects == part.scenes[0].objects
    assert not np.array_equal(whole.images[2], PhotoConfig().open("test", 5).batch([2]).images[0])


def test_the_sweep_is_the_demo_s_with_photographs() -> None:
    config = sweep_config(seeds=2)
    assert isinstance(config.experiment.run.scenes, PhotoConfig)
    names = ["baseline", "centre", "weight 5", "anchor other_scene_pre_projector"]
    assert [point.name for point in points(config)] == names
    assert config.experiment.transfer.families == ("polarity", "tilt", "texture", "thickness")
    assert list(config.experiment.all_seeds) == [400, 401]


def test_results_are_kept_and_the_scenes_drawn(tmp_path: Path) -> None:
    result = tmp_path / "sweep" / "seed-400" / "centre" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    (result.parent / "metrics.jsonl").write_text("")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    keep_sweep(tmp_path / "sweep", tmp_path / "kept")
    kept = sorted(x.relative_to(tmp_path / "kept") for x in (tmp_path / "kept").rglob("*.json"))
    assert kept == [Path("seed-400/centre/result.json"), Path("sweep.json")]
    assert not list((tmp_path / "kept").rglob("*.jsonl"))
    begin_from(tmp_path / "kept", tmp_path / "again")
    assert (tmp_path / "again" / "seed-400" / "centre" / "result.json").exists()
    draw_scenes(tmp_path / "scenes.png", 3)
    assert (tmp_path / "scenes.png").stat().st_size > 5000


def test_a_sweep_goes_on_from_what_is_kept(tmp_path: Path) -> None:
    begin_from(KEPT, tmp_path / "again")
    with open_sweep(sweep_config(), tmp_path / "again", fresh=False):
        left = steps_left(sweep_config(), tmp_path / "again")
    assert left < steps_left(sweep_config(), tmp_path / "empty")
