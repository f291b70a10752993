# SPDX-License-Identifier: Apache-2.0
"""What the measures share: checks of their input, and rows in pieces that bound memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**20
"""Elements of one piece: small enough to stay in a cache."""


LARGEST = 1e15
SHORTEST = 1e-15
"""Squares of float32 values beyond, and of rows below, would leave its range."""


def check_features(features: Tensor, name: str = "features", columns: int | None = None) -> None:
    """Raise ValueError, naming the argument, unless it is a finite (N, columns) of floats."""
    if features.dim() != 2 or columns not in (None, features.shape[1]):
        expected = "(N, D)" if columns is None else f"(N, {columns})"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(features.shape)}")
    if not features.is_floating_point() or features.element_size() < 2:
        raise ValueError(
            f"{name}: expected a floating dtype, got {features.dtype}; it takes 16 bits or more"
        )
    if not features.shape[1]:
        raise ValueError(f"{name}: expected at least 1 column, got 0")
    if not features.numel():
        return
    largest = max(abs(float(x)) for x in torch.aminmax(features.detach()))  # NaN if there is one
    if not math.isfinite(largest):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    if largest > LARGEST:
        raise ValueError(f"{name}: expected magnitudes up to {LARGEST:g}, got {largest:g}")


def check_ids(ids: Tensor, name: str, rows: int) -> None:
    """Raise ValueError, naming the argument, unless it is (rows,) integers."""
    if tuple(ids.shape) != (rows,):
        raise ValueError(f"{name}: expected shape {(rows,)}, got {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")


def check_mean(mean: Tensor, name: str) -> None:
    """Raise ValueError, naming the argument, unless it is a finite (D,) of floats."""
    if mean.dim() != 1:
        raise ValueError(f"{name}: expected shape (D,), got {tuple(mean.shape)}")
    check_features(mean[None], name)


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of at most PIECE elements that cover the rows."""
    step = max(1, PIECE // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def working(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """In float32, or float64 where one is: what rows are measured in before they are summed."""
    tensors = (x, *others)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def lengths(x: Tensor, before: Tensor | None = None) -> Tensor:
    """(N,) Euclidean norms of the rows, infinite for a row without a direction.

    That is a row below SHORTEST, or, given the lengths before a mean was subtracted, one that
    equalled that mean: what rounding left of it is no direction.
    """
    length = torch.linalg.vector_norm(x, dim=1)
    shortest = length.new_full((), SHORTEST)
    if before is not None:
        shortest = (8 * torch.finfo(x.dtype).eps * before).clamp_min(SHORTEST)
    return length.where(length > shortest, math.inf)
