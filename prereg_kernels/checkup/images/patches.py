# SPDX-License-Identifier: Apache-2.0
"""Where a visual token looks in its image, and which object it sees there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_COUNTED = 1 << 16  # ids below are counted as they are, larger ones by their rank
_CELLS = 1 << 22  # boxes x ids that are counted at a time


@dataclass(frozen=True)
class TokenGrid:
    """The places of an image's visual tokens, in the order in which they enter the LLM.

    Attributes:
        size: (height, width) of the image, px, before the processor touched it.
        shape: (rows, columns) of the grid that `row` and `column` index.
        row, column: (N,) int64; -1 for a token outside of the grid (a newline, an overview).
        boxes: (N, 4) float64: top, left, bottom, right of what the token covers, px of the image.
            A box may reach outside of the image, where a processor padded it; a token that stands
            for no place has NaN. Resampling and attention blur what a token sees beyond its box.
    """

    size: tuple[int, int]
    shape: tuple[int, int]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    boxes: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.row)


def regular_grid(
    size: tuple[int, int],
    shape: tuple[int, int],
    *,
    resized: tuple[int, int],
    window: tuple[float, float, float, float] | None = None,
) -> TokenGrid:
    """The grid of an image that was resized, then cropped or padded, and cut into equal cells.

    Args:
        size: (height, width) of the image, px.
        shape: (rows, columns) of the tokens, which come row by row.
        resized: (height, width) after resizing.
        window: top, left, bottom, right of the cut, in px of the resized image; it may reach
            outside. None: all of it.
    """
    top, left, bottom, right = window if window is not None else (0, 0, *resized)
    y = np.linspace(top, bottom, shape[0] + 1) * (size[0] / resized[0])
    x = np.linspace(left, right, shape[1] + 1) * (size[1] / resized[1])
    row, column = (index.ravel().astype(np.int64) for index in np.indices(shape))
    boxes = np.stack([y[row], x[column], y[row + 1], x[column + 1]], axis=1)
    return TokenGrid(size, shape, row, column, boxes)


def centre_window(
    resized: tuple[int, int], crop: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The window that transformers' `center_crop` cuts; it pads where the image is smaller."""
    top, left = ((have - want) // 2 for have, want in zip(resized, crop, strict=True))
    return top, left, top + crop[0], left + crop[1]


def owners(grid: TokenGrid, mask: NDArray[np.integer], purity: float = 0.5) -> NDArray[np.int64]:
    """The object that each token sees: the one with the most of its box, if that is enough.

    Args:
        mask: (H, W) object ids at any resolution of the whole image; negative is background.
        purity: the share of a box that its object must own, in (0, 1]. What lies outside of the
            image is background.

    Returns:
        (N,) ids, -1 = background, mixed, or no place. Ties go to the smaller id.

    Raises:
        ValueError: a purity outside of (0, 1], or a mask whose shape is not the image's.
    """
    if not 0 < purity <= 1:
        raise ValueError(f"purity: expected a share in (0, 1], got {purity}")
    check_mask(mask, grid.size)
    scale = np.array([mask.shape[0] / grid.size[0], mask.shape[1] / grid.size[1]] * 2)
    ids = None
    if mask.max() >= _COUNTED:
        ids, ranks = np.unique(mask, return_inverse=True)
        background = np.searchsorted(ids, 0)
        ids, mask = ids[background:], ranks.reshape(mask.shape) - background
    owner = np.full(len(grid), -1, dtype=np.int64)
    placed = np.flatnonzero(np.isfinite(grid.boxes).all(axis=1))
    boxes = grid.boxes[placed] * scale
    _, line, sizes = np.unique(boxes[:, [0, 2]], axis=0, return_inverse=True, return_counts=True)
    count = max(int(mask.max()), -1) + 2
    for tokens in np.split(line.ravel().argsort(kind="stable"), np.cumsum(sizes)[:-1]):
        parts = min(len(tokens), -(-len(tokens) * count // _CELLS))
        for part in np.array_split(tokens, parts) if parts else ():
            owner[placed[part]] = _owners(mask, boxes[part], purity)
    if ids is not None:
        owner[owner >= 0] = ids[owner[owner >= 0]]
    return owner


def _owners(
    mask: NDArray[np.integer], boxes: NDArray[np.float64], purity: float
) -> NDArray[np.int64]:
    """The owners of boxes between the same top and bottom, in pixels of the mask."""
    top, left, bottom, right = boxes.T
    _, y, height = _pixels(top[:1], bottom[:1], mask.shape[0])
    box, x, width = _pixels(left, right, mask.shape[1])
    touched = mask[y[0] : y[-1] + 1, x] if len(y) else mask[:0, x]
    ids = np.maximum(touched.astype(np.int64), -1) + 1
    count = int(ids.max(initial=0)) + 1
    covered = np.bincount(
        (ids + box * count).ravel(), np.outer(height, width).ravel(), len(boxes) * count
    ).reshape(len(boxes), count)
    covered[:, 0] = 0  # background
    area = (bottom - top) * (right - left)
    # sums of equal shares may differ by rounding
    enough = np.maximum(covered.max(axis=1), purity * area) - 1e-9 * area
    owning = (covered >= enough[:, None]) & (area[:, None] > 0)
    return np.asarray(np.where(owning.any(axis=1), owning.argmax(axis=1) - 1, -1), dtype=np.int64)


def _pixels(
    low: NDArray[np.float64], high: NDArray[np.float64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """What intervals touch of a line of pixels: the interval's number, the pixel, and how much of
    it is covered."""
    first = np.clip(np.floor(low), 0, size).astype(np.int64)
    interval, pixel = ranges(first, np.clip(np.ceil(high), 0, size).astype(np.int64))
    return interval, pixel, np.minimum(pixel + 1, high[interval]) - np.maximum(pixel, low[interval])


def ranges(
    first: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The whole numbers from each `first` up to its `end`, all in a row, behind the index of the
    range that each is of."""
    counts = np.maximum(end - first, 0)
    index = np.repeat(np.arange(len(first)), counts)
    return index, np.arange(len(index)) + np.repeat(first - (np.cumsum(counts) - counts), counts)


def check_mask(mask: NDArray[np.integer], size: tuple[int, int]) -> None:
    """Raise ValueError unless the mask can be of the image: equal proportions, but for rounding."""
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"mask: expected shape (H, W), got {mask.shape}")
    H, W = mask.shape
    # the widths that the mask's height allows, if both sides were rounded to whole pixels
    low, high = (size[1] * (H + half) / size[0] for half in (-1, 1))
    if not low - 1 <= W <= high + 1:
        raise ValueError(
            f"mask: its {W} x {H} pixels do not have the proportions of the image's "
            f"{size[1]} x {size[0]}"
        )
