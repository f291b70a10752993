"""Where a visual token looks in its image, and which object it sees there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    placed = np.isfinite(grid.boxes).all(axis=1)
    boxes = grid.boxes[placed] * scale
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    best = np.zeros(len(boxes))
    owner = np.full(len(boxes), -1, dtype=np.int64)
    for thing in np.unique(mask[mask >= 0]):
        share = _area_in(mask == thing, boxes) / area
        # of equal shares, computed by different sums, the first wins whatever the rounding
        better = share > best + 1e-9
        owner[better], best[better] = thing, share[better]
    owner[best < purity - 1e-9] = -1
    found = np.full(len(grid), -1, dtype=np.int64)
    found[placed] = owner
    return found


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


def _area_in(region: NDArray[np.bool_], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many pixels of the region each box covers, parts of pixels counted as parts."""
    integral = np.zeros((region.shape[0] + 1, region.shape[1] + 1))
    np.cumsum(np.cumsum(region, axis=0, dtype=np.float64), axis=1, out=integral[1:, 1:])

    def upto(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
        y, x = np.clip(y, 0, region.shape[0]), np.clip(x, 0, region.shape[1])
        i = np.minimum(y.astype(np.int64), region.shape[0] - 1)
        j = np.minimum(x.astype(np.int64), region.shape[1] - 1)
        v, u = y - i, x - j
        upper = integral[i, j] * (1 - u) + integral[i, j + 1] * u
        lower = integral[i + 1, j] * (1 - u) + integral[i + 1, j + 1] * u
        return upper * (1 - v) + lower * v

    top, left, bottom, right = boxes.T
    return upto(bottom, right) - upto(top, right) - upto(bottom, left) + upto(top, left)
