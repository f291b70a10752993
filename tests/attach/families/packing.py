# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch in one row, told apart by their positions, which begin anew."""

from __future__ import annotations

from typing import Any

import torch

from tests.attach.families.batches import Batch


def pack(model: Any, batch: Batch) -> Batch:
    """The same words, images and labels, in a single row without padding or attention mask."""
    inputs = dict(batch.inputs)
    keep = inputs.pop("attention_mask") == 1
    rows = [i for i in range(len(keep))]
    positions = [torch.arange(int(keep[i].sum())) for i in rows]
    position_ids = torch.cat(positions)[None]
    if hasattr(model.model, "get_rope_index"):
        names = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids")  # the last from 5 on
        told = {n: inputs[n] for n in names if n in inputs}
        whole, _ = model.model.get_rope_index(
            inputs["input_ids"], attention_mask=keep.long(), **told
        )
        multimodal = torch.cat([whole[:, i, keep[i]] for i in rows], dim=1)[:, None]
        position_ids = torch.cat((position_ids[None], multimodal))
    for name in ("input_ids", "labels", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name][keep][None]
    starts = torch.cat(positions) == 0
    inputs["labels"] = inputs["labels"].masked_fill(starts, -100)
    inputs |= {"position_ids": position_ids, "use_cache": False}
    return batch._replace(inputs=inputs, visual=batch.visual[keep][None])
