# SPDX-License-Identifier: Apache-2.0
"""Finds which visual token belongs to which image, for `level="global"`, from the batch alone.

`Family.images` says which of two rules holds:

- "runs": an image is visual tokens of one id, side by side in a row of `input_ids`. Anything else,
  or the row's border, is at both ends. Processors put a token around every image, and transformers
  itself numbers the positions of Qwen's images by such runs. In a packed row a run also ends where
  the next sequence begins. So a crop or a frame with tokens around it is an image. A video is one
  image, except for Qwen3-VL, which writes a timestamp before every two frames.
- "equal": the visual tokens are divided evenly among the images of the batch, in order. This is for
  families whose images have the same number of tokens and may follow each other without a gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.attach.family import Family


@dataclass(frozen=True)
class Images:
    """The images of a batch.

    Attributes:
        of_token: (N,) int64, the image's number for each visual token, ascending.
        count: the number of images that attention shows.
        shown: (count,) int64, which of the batch's images these are. None: all of them.
        in_batch: the number of images in the batch.
    """

    of_token: Tensor
    count: int
    shown: Tensor | None
    in_batch: int


def check_images(family: Family) -> None:
    """Raise ValueError unless the images of the family's batches can be told apart."""
    if family.images is None:
        raise ValueError(
            f"level: 'global' is the mean over each image, and a batch of {family.name} does not "
            "say which visual tokens belong to one image; expected level='patch'"
        )


def count_images(
    family: Family, batch: Mapping[str, Any], ids: Tensor, by_id: Tensor, visual: Tensor
) -> Tensor:
    """How many images have a visual token: 0-dim, int64, without a sync.

    Args:
        batch: the keyword arguments of the model's forward.
        ids: (rows, length), the `input_ids`. by_id: bool, where they are ids of visual tokens.
        visual: bool, where they are and attention does not hide them.
    """
    numbers = _numbers(family, batch, ids, by_id)
    if numbers is None:
        return torch.zeros((), dtype=torch.int64, device=ids.device)
    nowhere = ids.numel()  # as an image's number, which is smaller
    flags = torch.zeros(nowhere + 1, dtype=torch.int64, device=ids.device)
    flags[torch.where(visual.flatten(), numbers, nowhere)] = 1
    return flags[:nowhere].sum()


def find_images(
    family: Family, batch: Mapping[str, Any], ids: Tensor, by_id: Tensor, index: Tensor
) -> Images:
    """The images of a batch that attention shows, at least in part.

    This takes two or three syncs. Right after the sync that found `index`, they wait for nothing.

    Args:
        batch, ids, by_id: as for `count_images`.
        index: (N,) int64, the visual positions in the flattened `ids`, ascending.

    Raises:
        ValueError: the batch's images do not agree with its visual tokens.
    """
    if not index.numel():
        return Images(index, 0, None, 0)
    counted, tokens = _counted(family, batch), int(by_id.sum())
    numbers = _numbers(family, batch, ids, by_id)
    if family.images == "equal" and (
        numbers is None or tokens % (counted or 1) or batch.get("image_sizes") is not None
    ):
        names = " and ".join(family.counted_by)
        raise ValueError(
            f"level: 'global' needs images of equally many tokens of {family.name}; got "
            f"{tokens} visual tokens for {counted or 'no'} images ({names}), "
            f"image_sizes {'not ' * (batch.get('image_sizes') is None)}given"
        )
    assert numbers is not None
    count = int(numbers[-1]) + 1
    if counted is not None and counted != count:
        arguments = " and ".join(family.counted_by + family.cut_by)
        raise ValueError(
            f"level: 'global' takes side by side visual tokens for one image; got {count} runs of "
            f"them for {counted} images ({arguments}); expected another "
            "token between any two images, or level='patch'"
        )
    of_token = numbers[index]
    if tokens == index.numel():
        return Images(of_token, count, None, count)
    shown, of_token = torch.unique(of_token, return_inverse=True)
    return Images(of_token, shown.numel(), shown, count)


def _numbers(family: Family, batch: Mapping[str, Any], ids: Tensor, by_id: Tensor) -> Tensor | None:
    """(positions,) int64: at a visual id its image's number, at the last position the last one's.

    None: the batch counts no images, where that is how they are told apart.
    """
    if family.images == "runs":
        return _starts(ids, by_id, batch).flatten().cumsum(0) - 1
    counted = _counted(family, batch)
    if not counted:
        return None
    each = (by_id.sum() // counted).clamp(min=1)
    return (by_id.flatten().cumsum(0) - 1) // each


def _starts(ids: Tensor, visual: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The first token of each run: bool, the shape of `ids`."""
    changed = torch.ones_like(visual)
    changed[:, 1:] = (ids[:, 1:] != ids[:, :-1]) | _packed(batch, ids)[:, 1:]
    return visual & changed


def _packed(batch: Mapping[str, Any], ids: Tensor) -> Tensor:
    """The first token of each packed sequence but a row's first: bool, the shape of `ids`."""
    begins = torch.zeros_like(ids, dtype=torch.bool)
    positions, numbers = batch.get("position_ids"), batch.get("seq_idx")
    if isinstance(positions, Tensor):  # those of an image's tokens may be all the same
        positions = positions[0] if positions.dim() == 3 else positions  # of text, or of time
        if positions.shape[-1:] == ids.shape[-1:]:
            begins[:, 1:] |= (positions[:, 1:] < positions[:, :-1]).to(ids.device)
    if isinstance(numbers, Tensor) and numbers.shape == ids.shape:
        begins[:, 1:] |= (numbers[:, 1:] != numbers[:, :-1]).to(ids.device)
    ends = batch.get("cu_seq_lens_q")
    if isinstance(ends, Tensor) and len(ids) == 1:  # 0, and where each sequence ends
        begins[0, ends[:-1].to(ids.device).long()] = True
    return begins


def _counted(family: Family, batch: Mapping[str, Any]) -> int | None:
    """The number of images by the batch's arguments. None: they do not say."""
    given = [len(batch[name]) for name in family.counted_by if batch.get(name) is not None]
    grids = [batch[name] for name in family.cut_by if batch.get(name) is not None]
    given += [int(grid[:, 0].sum()) for grid in grids]
    return sum(given) if given else None
