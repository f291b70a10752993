"""What the measures share: checks of their input, and rows in pieces that bound memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**23
"""Elements of one piece: 64 MiB in float64."""


def check_features(features: Tensor, name: str = "features", columns: int | None = None) -> None:
    """Raise ValueError, naming the argument, unless it is a finite (N, columns) of floats."""
    if features.dim() != 2 or columns not in (None, features.shape[1]):
        expected = "(N, D)" if columns is None else f"(N, {columns})"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(features.shape)}")
    if not features.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {features.dtype}")
    if features.numel() and not all(math.isfinite(float(x)) for x in torch.aminmax(features)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def check_ids(ids: Tensor, name: str, rows: int) -> None:
    """Raise ValueError, naming the argument, unless it is (rows,) integers."""
    if tuple(ids.shape) != (rows,):
        raise ValueError(f"{name}: expected shape {(rows,)}, got {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of at most PIECE elements that cover the rows."""
    step = max(1, PIECE // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def unit_rows(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Each row over its length; one that is 0, or rounding beside `scale` (N,), becomes 0.

    `scale` holds the lengths before a mean was subtracted: of a row that equals the mean only
    rounding is left, and it has a direction.
    """
    length = torch.linalg.vector_norm(x, dim=1)
    floor = 0.0 if scale is None else 1e-12 * scale
    return x / length.where(length > floor, math.inf)[:, None]
