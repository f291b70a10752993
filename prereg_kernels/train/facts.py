# SPDX-License-Identifier: Apache-2.0
"""What the host knows of a batch: counted where the batch is made, so that no GPU is asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from prereg_kernels.train.chats import IGNORED
from prereg_kernels.train.collator import SEEN, UNPADDED, Failed, flat
from prereg_kernels.train.sample import Sample

FACTS = "facts"
"""A batch's entry beside the model's: its `Facts`."""


class Facts(NamedTuple):
    """Of a micro-batch.

    Attributes:
        where: of its samples: file and line, or data set and row.
        tokens: without padding. visual_tokens: of these. labels: tokens that are learned.
        images: how many. pixels: numbers that the vision encoder gets.
    """

    where: tuple[str, ...]
    tokens: int
    visual_tokens: int
    labels: int
    images: int
    pixels: int


class CountingCollator:
    """A collator, whose batches get their facts.

    Args:
        collate: makes the batches, each with its `SEEN`.
        visual_ids: the ids that stand for images.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        visual_ids: Collection[int],
    ) -> None:
        self._collate, self._visual_ids = collate, torch.tensor(sorted(visual_ids))

    def __call__(
        self, items: Sequence[Sample | Failed | Sequence[Sample | Failed]]
    ) -> dict[str, Any]:
        """As the collator; with `FACTS`."""
        batch = self._collate(items)
        unpadded = batch.pop(UNPADDED, None)
        return {**batch, FACTS: self._facts(flat(items), batch, unpadded)}

    def _facts(
        self, samples: Sequence[Sample | Failed], batch: Mapping[str, Any], unpadded: int | None
    ) -> Facts:
        left_out = {where for where, _ in batch[SEEN][1]}
        used = [x for x in samples if isinstance(x, Sample) and x.where not in left_out]
        ids, pixels = batch["input_ids"], batch.get("pixel_values")
        seen = batch["attention_mask"].bool() if "attention_mask" in batch else ids == ids
        return Facts(
            where=tuple(sample.where for sample in used),
            tokens=int(seen.sum()) if unpadded is None else unpadded,
            visual_tokens=int((torch.isin(ids, self._visual_ids) & seen).sum()),
            labels=int((batch["labels"][:, 1:] != IGNORED).sum()),
            images=sum(len(sample.images) for sample in used),
            pixels=0 if pixels is None else pixels.numel(),
        )
