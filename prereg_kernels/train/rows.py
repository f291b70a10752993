# SPDX-License-Identifier: Apache-2.0
"""A batch of padded samples as packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from prereg_kernels.train.chats import IGNORED


def pack(batch: dict[str, Tensor], length: int, pad: int, *, is_flat: bool) -> dict[str, Tensor]:
    """A padded batch in rows of up to `length` tokens, its samples in the same order.

    "attention_mask" goes, and "position_ids" come. Padding is a sample of its own, behind the
    others. A sample's first token has no label: the one before it is another's.

    Args:
        is_flat: all in one row, as flash-attention takes them.
    """
    ids, sizes = batch["input_ids"], batch["attention_mask"].sum(dim=1).tolist()
    rows: list[list[int]] = [[]]
    used = 0
    for number, size in enumerate(sizes):
        if used + size > length and not is_flat and rows[-1]:
            rows.append([])
            used = 0
        rows[-1].append(number)
        used += size
    width = max(sum(sizes[i] for i in row) for row in rows)
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED
    places = torch.arange(ids.shape[1]).expand_as(ids)
    tokens = {name: x for name, x in batch.items() if x.shape[:2] == ids.shape}
    result = {name: x for name, x in batch.items() if name not in tokens}
    for name, x in {**tokens, "labels": labels, "position_ids": places}.items():
        if name == "attention_mask":
            continue
        fill_with = {"input_ids": pad, "labels": IGNORED}.get(name, 0)
        packed_rows = []
        for row in rows:
            parts = [x[i, : sizes[i]] for i in row]
            rest = width - sum(map(len, parts))
            behind = x.new_full((rest, *x.shape[2:]), fill_with)
            if name == "position_ids":
                behind = torch.arange(rest)
            packed_rows.append(torch.cat([*parts, behind]))
        result[name] = torch.stack(packed_rows)
    return result
