# SPDX-License-Identifier: Apache-2.0
"""Finds the visual tokens of a batch: positions with their ids that attention does not hide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

HIDDEN = -1e3
"""A score this far below the others has a weight of 0 in float32: exp(-104) is the least above it.
Masks hide by -1e4, which float16 can hold, -1e9, the dtype's least number or -inf."""


def find_marked(input_ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Where one of the ids is, hidden or not: bool, the shape of `input_ids`."""
    marked = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in tokens:
        marked |= input_ids == token
    return marked


def hide(marked: Tensor, attention_mask: Any) -> Tensor:
    """The marked positions that attention shows.

    A position that the attention mask hides is padding, whatever its id. Some trainers append an
    image to every batch of text alone, so that their vision tower runs, and hide it.

    Args:
        marked: bool, (rows, length). attention_mask: as the model's forward takes it, see
            `find_visible`.
    """
    visible = find_visible(attention_mask, marked)
    return marked if visible is None else marked & visible


def find_visible(attention_mask: Any, input_ids: Tensor) -> Tensor | None:
    """What the attention mask shows: bool, the shape of `input_ids`. None: it hides nothing.

    Args:
        attention_mask: (rows, keys), 0 where a position is hidden. Or (rows, heads, queries, keys),
            bool or added to the scores, which -1e3 or less hides; a position is hidden if no query
            sees it. Or a mapping of
            such masks by the kind of attention, of which the fullest counts. The last keys are
            those of `input_ids`. Other kinds of masks say nothing by position, and hide nothing.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("full_attention")
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        return None
    rows, length = input_ids.shape
    if attention_mask.shape[-1] < length or attention_mask.shape[0] not in (1, rows):
        return None
    keys = attention_mask[..., -length:].to(input_ids.device)
    if keys.is_floating_point() and keys.dim() == 4:
        keys = keys > HIDDEN
    visible = keys.bool()
    return (visible.flatten(1, 2).any(dim=1) if keys.dim() == 4 else visible).expand(rows, length)
