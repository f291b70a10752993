"""Which visual token belongs to which image: for `level="global"`, told from the batch alone.

What an image is, in the tokens of a batch (`Family.images` says which of the two holds):

- "runs": visual tokens of one id side by side in a row of `input_ids`, with anything else, or the
  row's border, at both ends. Processors put a token around every image, and transformers itself
  numbers the positions of Qwen's by such runs. So a video is one image, but for Qwen3-VL, which
  writes a timestamp before every two frames; a crop or a frame that has tokens around it is one.
- "equal": the visual tokens divided evenly among the images of the batch, in order, as in families
  whose images have the same number of tokens each and may follow each other without a gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.families import Family


@dataclass(frozen=True)
class Images:
    """The images of a batch.

    Attributes:
        of_token: (N,) int64, the number of the image of each visual token; ascending.
        count: how many there are.
    """

    of_token: Tensor
    count: int


def check_images(family: Family) -> None:
    """Raise ValueError unless the images of the family's batches can be told apart."""
    if family.images is None:
        raise ValueError(
            f"level: 'global' is the mean over each image, and a batch of {family.name} does not "
            "say which visual tokens belong to one image; expected level='patch'"
        )


def count_images(family: Family, batch: Mapping[str, Any], ids: Tensor, visual: Tensor) -> Tensor:
    """0-dim, int64: how many images there are, without a sync.

    Args:
        batch: the keyword arguments of the model's forward.
        ids: (rows, length), the `input_ids`. visual: bool, where they are visual tokens.
    """
    if family.images == "runs":
        return _starts(ids, visual).sum()
    return torch.full((), _counted(family, batch) or 0, dtype=torch.int64, device=ids.device)


def find_images(family: Family, batch: Mapping[str, Any], ids: Tensor, index: Tensor) -> Images:
    """The images of a batch.

    One sync, and one more for videos that are cut into runs, neither of which has anything to wait
    for right after the one that found `index`.

    Args:
        batch, ids: as for `count_images`.
        index: (N,) int64, the visual positions in the flattened `ids`, ascending.

    Raises:
        ValueError: what the batch holds does not agree with its visual tokens.
    """
    tokens = index.numel()
    if not tokens:
        return Images(index, 0)
    counted = _counted(family, batch)
    if family.images == "equal":
        if not counted or tokens % counted or batch.get("image_sizes") is not None:
            names = " and ".join(family.counted_by)
            raise ValueError(
                f"level: 'global' needs images of equally many tokens of {family.name}; got "
                f"{tokens} visual tokens for {counted or 'no'} images ({names}), "
                f"image_sizes {'not ' * (batch.get('image_sizes') is None)}given"
            )
        each = tokens // counted
        return Images(torch.arange(tokens, device=ids.device) // each, counted)
    visual = torch.zeros_like(ids, dtype=torch.bool).flatten().index_fill(0, index, True)
    starts = _starts(ids, visual.view_as(ids)).flatten()
    of_token = starts.cumsum(0)[index] - 1
    count = int(of_token[-1]) + 1
    if counted is not None and counted != count:
        arguments = " and ".join(family.counted_by + family.cut_by)
        raise ValueError(
            f"level: 'global' takes side by side visual tokens for one image; got {count} runs of "
            f"them for {counted} images ({arguments}); expected another "
            "token between any two images, or level='patch'"
        )
    return Images(of_token, count)


def _starts(ids: Tensor, visual: Tensor) -> Tensor:
    """Bool, the shape of `ids`: the first token of each run."""
    changed = torch.ones_like(visual)
    changed[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return visual & changed


def _counted(family: Family, batch: Mapping[str, Any]) -> int | None:
    """The images by the arguments of the batch; None where these do not say."""
    given = [len(batch[name]) for name in family.counted_by if batch.get(name) is not None]
    grids = [batch[name] for name in family.cut_by if batch.get(name) is not None]
    given += [int(grid[:, 0].sum()) for grid in grids]
    return sum(given) if given else None
