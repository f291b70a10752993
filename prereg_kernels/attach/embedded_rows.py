# SPDX-License-Identifier: Apache-2.0
"""Tells which rows of a decoder's input come from the embedding table, and which hold features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def differs_from(states: Tensor, tables: list[Tensor]) -> Tensor:
    """Where a row is in no table: bool, (rows, length).

    In a table of the same shape, a row is compared with the one at its place. If no table has that
    shape, it is compared with all rows.
    """
    whole = [(states != table).any(dim=-1) for table in tables if table.shape == states.shape]
    if whole:
        return torch.stack(whole).all(dim=0)
    known = torch.cat([_numbers(table).flatten() for table in tables])
    return ~torch.isin(_numbers(states), known)


def _numbers(rows: Tensor) -> Tensor:
    """int64, one for each row: the same for the same rows, and hardly for others."""
    bits = (rows.float() + 0.0).view(torch.int32).long()  # + 0.0, as 0 has two signs
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, bits.shape[-1:], generator=generator)
    return (bits * factors.to(bits.device)).sum(dim=-1)


def varies_by_place(states: Tensor, ids: Any, visible: Tensor, visual: Tensor) -> Tensor | None:
    """Where an id has different rows at different places: bool, (rows, length).

    A visual id that stands at one place only counts among them. None: the ids say nothing, because
    the rows of most words vary too, or because no id's rows vary.
    """
    if not isinstance(ids, Tensor) or ids.shape != states.shape[:-1]:
        return None
    ids = ids.to(visual.device).where(visible, -1)
    tokens, number = ids.flatten().unique(return_inverse=True)
    nothing, place = torch.zeros_like(tokens), torch.arange(ids.numel(), device=ids.device)
    first = nothing.scatter_reduce(0, number, place, "amin", include_self=False)[number]
    rows, column = states.flatten(0, -2), place % ids.shape[1]
    same = (rows == rows[first.to(rows.device)]).all(dim=-1).to(ids.device)

    def any_of(flags: Tensor) -> Tensor:  # of each token's places
        return nothing.index_add(0, number, flags.long()) > 0

    # Rows that hold positions are the same in one column
    varies, repeated = any_of(~same), any_of(column != column[first])
    is_word = any_of((visible & ~visual).flatten()) & ~any_of(visual.flatten()) & repeated
    hidden = tokens < 0
    varying, constant = is_word & varies & ~hidden, is_word & ~varies & ~hidden
    if not bool((varies & ~hidden).any()) or int(varying.sum()) >= int(constant.sum()):
        return None
    return torch.where(
        visual, (varies | ~repeated)[number].view_as(ids), varies[number].view_as(ids)
    )
