# SPDX-License-Identifier: Apache-2.0
"""Boxes and owners of tokens, against masks counted by hand and the demo's own assignment."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from prereg_kernels.checkup.images.patches import (
    TokenGrid,
    centre_window,
    check_mask,
    owners,
    regular_grid,
)
from prereg_kernels.demo.data.scenes import Scenes, patch_owners


def test_boxes_after_resize_and_crop() -> None:
    # 40 x 60 -> 20 x 30 (half), the centre 20 x 20 cut out: columns 5 to 25, in the image 10 to 50
    grid = regular_grid(
        (40, 60), (2, 2), resized=(20, 30), window=centre_window((20, 30), (20, 20))
    )
    assert grid.boxes.tolist() == [
        [0, 10, 20, 30],
        [0, 30, 20, 50],
        [20, 10, 40, 30],
        [20, 30, 40, 50],
    ]
    assert grid.row.tolist() == [0, 0, 1, 1]
    assert grid.column.tolist() == [0, 1, 0, 1]


def test_a_small_image_is_padded() -> None:
    # 10 x 10 in a window of 14: two pixels on each side
    assert centre_window((10, 10), (14, 14)) == (-2, -2, 12, 12)


def test_owners_are_the_demos() -> None:
    batch = Scenes("test").batch(range(20))
    size = batch.images.shape[1:]
    for purity in (0.3, 0.5, 0.8, 1.0):
        expected = patch_owners(batch.masks, 8, purity)
        for mask, owner in zip(batch.masks, expected, strict=True):
            grid = regular_grid(size, (6, 6), resized=size)
            assert owners(grid, mask, purity).tolist() == owner.tolist()


def test_owners_at_any_resolution_of_the_mask() -> None:
    grid = regular_grid((48, 48), (6, 6), resized=(48, 48))
    mask = Scenes("test").scene(3).mask
    expected = owners(grid, mask)
    assert (expected >= 0).any()
    assert owners(grid, mask.repeat(3, axis=0).repeat(3, axis=1)).tolist() == expected.tolist()
    halves = mask[::2, ::2].repeat(2, axis=0).repeat(2, axis=1)
    assert owners(grid, mask[::2, ::2]).tolist() == owners(grid, halves).tolist()


def test_parts_of_pixels_count_as_parts() -> None:
    # two tokens over three columns: the middle column is shared; object 5 owns it alone
    mask = np.array([[-1, 5, -1]])
    grid = regular_grid((1, 3), (1, 2), resized=(1, 3))
    assert owners(grid, mask, 0.33).tolist() == [5, 5]  # half a pixel of one and a half
    assert owners(grid, mask, 0.34).tolist() == [-1, -1]


def test_outside_of_the_image_is_background() -> None:
    grid = regular_grid((2, 2), (1, 1), resized=(2, 2), window=(-1, 0, 3, 2))
    mask = np.zeros((2, 2), dtype=np.int64)
    assert owners(grid, mask, 0.5).tolist() == [0]
    assert owners(grid, mask, 0.51).tolist() == [-1]


def test_ties_go_to_the_smaller_id_and_no_place_has_no_owner() -> None:
    boxes = np.array([[0, 0, 1, 3], [np.nan] * 4, [0, 1, 1, 3]])
    index = np.array([0, -1, 0])
    grid = TokenGrid((1, 3), (1, 1), index, index, boxes)
    mask = np.array([[7, 2, 7]])
    assert owners(grid, mask, 0.5).tolist() == [7, -1, 2]


def owner_of(box: list[float], mask: np.ndarray, purity: float) -> int:
    """By the definition: each pixel adds the part of it that the box covers."""
    top, left, bottom, right = map(Fraction, box)
    shares: Counter[int] = Counter()
    for (y, x), thing in np.ndenumerate(mask):
        height = min(y + 1, bottom) - max(y, top)
        width = min(x + 1, right) - max(x, left)
        if thing >= 0 and height > 0 and width > 0:
            shares[int(thing)] += height * width
    area = (bottom - top) * (right - left)
    best = max(shares.values(), default=Fraction(0))
    if not area or best < Fraction(purity) * area:
        return -1
    return min(thing for thing, share in shares.items() if share == best)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "uint16", "int32"])
@pytest.mark.parametrize("largest", [3, 100, 60_000, 2_000_000_000])
def test_owners_of_any_boxes_by_the_definition(dtype: str, largest: int) -> None:
    info = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    largest = min(largest, info.max)
    things = np.array([-3, -1, 0, largest // 3, largest // 2, largest])
    things = things[things >= info.min]
    mask = rng.choice(things, (7, 9)).astype(dtype)
    corner = rng.integers(-16, 80, (60, 2)) / 8
    boxes = np.hstack([corner, corner + rng.integers(0, 40, (60, 2)) / 8])
    boxes[::7, :] = np.nan
    boxes[1::7, [0, 2]] = boxes[1, [0, 2]]  # several between the same top and bottom
    index = np.zeros(60, dtype=np.int64)
    found = owners(TokenGrid((7, 9), (1, 1), index, index, boxes), mask, 0.25)
    expected = [-1 if np.isnan(box[0]) else owner_of(box, mask, 0.25) for box in boxes.tolist()]
    assert found.tolist() == expected
    assert len(set(expected)) > 2


def test_rounding_decides_no_tie() -> None:
    mask = np.array([[7, 7, 7, 2, 2, 2]])
    index = np.zeros(99, dtype=np.int64)
    cut = np.arange(1, 100) / 100
    boxes = np.stack([0 * cut, cut, 0 * cut + 1, 6 - cut], axis=1)  # as much of 7 as of 2
    assert owners(TokenGrid((1, 6), (1, 1), index, index, boxes), mask, 0.5).tolist() == 99 * [2]


def test_owners_of_many_ids_take_bounded_memory() -> None:
    mask = np.arange(60_000).reshape(20, 3000)
    grid = regular_grid((20, 3000), (1, 600), resized=(20, 3000))
    tracemalloc.start()
    found = owners(grid, mask, 0.01)
    assert tracemalloc.get_traced_memory()[1] < 1.5e8  # 36 million pairs of box and id
    tracemalloc.stop()
    assert (found == np.arange(600) * 5).all()


def test_owners_take_one_pass_however_many_objects() -> None:
    def seconds(objects: int) -> float:
        start = time.process_time()
        owners(grid, mask % objects)
        return time.process_time() - start

    grid = regular_grid((240, 320), (24, 24), resized=(240, 320))
    mask = np.arange(240 * 320).reshape(240, 320)
    assert min(seconds(500) for _ in range(3)) < 10 * min(seconds(1) for _ in range(3))


@pytest.mark.parametrize("purity", [0.0, -1.0, 1.1, float("nan")])
def test_purity_is_checked(purity: float) -> None:
    grid = regular_grid((2, 2), (1, 1), resized=(2, 2))
    with pytest.raises(ValueError, match="purity"):
        owners(grid, np.zeros((2, 2), dtype=np.int64), purity)


@pytest.mark.parametrize(
    ("mask", "fits"),
    [
        ((480, 640), True),
        ((240, 320), True),
        ((119, 159), True),  # rounded down
        ((121, 160), True),
        ((640, 480), False),  # turned
        ((480, 600), False),
        ((0, 640), False),
    ],
)
def test_masks_have_the_proportions_of_the_image(mask: tuple[int, int], fits: bool) -> None:
    if fits:
        check_mask(np.zeros(mask, dtype=np.int64), (480, 640))
    else:
        with pytest.raises(ValueError, match="mask: "):
            check_mask(np.zeros(mask, dtype=np.int64), (480, 640))
