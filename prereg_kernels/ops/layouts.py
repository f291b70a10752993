# SPDX-License-Identifier: Apache-2.0
"""Sequences that come first: (S, B, D), as Megatron has them, read and written where they lie.

The ops see (B, S, D), a view whose batches are neighbours in memory. Rows that a mask or an index
selects are taken by number, in the order of (B, S), so that every result is bitwise that of a
(B, S, D) which is contiguous. Without a selection the view is copied, as other strides are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prereg_kernels.ops.names import LAYOUTS
from prereg_kernels.ops.spec import check_name


def batch_first(hidden: Tensor, anchor: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """`hidden` and `anchor`, with layout="sbh" as views of (B, S, ...).

    Raises:
        ValueError: an unknown layout, or `hidden` is not (S, B, D).
    """
    check_name("layout", layout, LAYOUTS)
    if layout == "bsh":
        return hidden, anchor
    if isinstance(hidden, Tensor) and hidden.dim() != 3:
        raise ValueError(
            f"hidden: expected shape (S, B, D) with layout='sbh', got {tuple(hidden.shape)}"
        )
    is_whole = isinstance(anchor, Tensor) and anchor.dim() == 3  # else a row per visual token
    return hidden.transpose(0, 1), anchor.transpose(0, 1) if is_whole else anchor


def is_turned(x: Tensor, select: Tensor | None) -> bool:
    """Whether the rows of x that are selected are read where a (S, B, D) has them in memory.

    All rows at once are read as one matrix.
    """
    if select is None or x.dim() != 3:
        return False
    (batch, length, _), (by_row, by_position, _) = x.shape, x.stride()
    return by_position == batch * by_row and by_row != length * by_position


def rows_of(x: Tensor, turned: bool) -> Tensor:
    """The rows of (..., D), or those of (B, S, D) in the order of (S, B): (T, D)."""
    return (x.transpose(0, 1) if turned else x).reshape(-1, x.shape[-1])


def of_rows(rows: Tensor, shape: torch.Size, turned: bool) -> Tensor:
    """`rows_of`, undone."""
    if not turned:
        return rows if rows.dim() == len(shape) else rows.view(shape)
    batch, length, width = shape
    return rows.view(length, batch, width).transpose(0, 1)


def places_of(index: Tensor | None, shape: torch.Size, turned: bool) -> Tensor | None:
    """The numbers in `rows_of` of rows that are numbered in the order of the shape."""
    if index is None or not turned:
        return index
    batch, length, _ = shape
    return index % length * batch + torch.div(index, length, rounding_mode="floor")
