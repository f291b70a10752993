# SPDX-License-Identifier: Apache-2.0
"""NextMask: where the visual tokens of the next forward pass are, if its ids do not say so."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.attach.checkpointing import is_in_backward


@dataclass
class Kept:
    """The mask of a pass that backward may run again, as a checkpoint around the call does."""

    batch: weakref.ref[Tensor]
    mask: Tensor | None  # None: it went by ids
    is_clear: bool  # False: passes of the same batch had different ones
    is_found: bool = False


class NextMask:
    """The mask that one forward pass takes: `PRe.next_visual_mask`.

    Attributes:
        mask: None, or the one that waits for its pass.
        kept: those of passes whose batch still lives.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.kept: list[Kept] = []
        self._is_of_backward = False  # a checkpointed function sets it again as backward runs it

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which take over no pass."""
        return vars(NextMask())

    def put(self, mask: Tensor | None) -> None:
        """Set the mask of the next pass.

        Raises:
            TypeError: it is no Tensor of bool.
            ValueError: it is not two-dimensional.
        """
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"next_visual_mask: expected a Tensor or None, got {type(mask).__name__}"
            )
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"next_visual_mask: expected dtype torch.bool, got {mask.dtype}")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                "next_visual_mask: expected the shape of input_ids, (rows, length), got "
                f"{tuple(mask.shape)}"
            )
        self.mask = mask
        self._is_of_backward = not torch.compiler.is_compiling() and is_in_backward()

    def take(self, inputs: Mapping[str, Any], training: bool) -> Tensor | None:
        """The mask for the pass of a call with these arguments. None: its ids say it.

        Args:
            training: of the module; backward runs no other call again.

        Raises:
            ValueError: the mask is on another device than the batch; or backward runs the call
                again, and which mask it had is not known.
        """
        if torch.compiler.is_compiling():
            mask, self.mask = self.mask, None
            return mask
        ids, again = inputs.get("input_ids"), is_in_backward()
        batch = inputs.get("inputs_embeds") if ids is None else ids
        mask = None
        if self._is_of_backward == again:
            mask, self.mask = self.mask, None
        if not isinstance(batch, Tensor):
            return mask
        if mask is None and again:
            return self._find(batch)
        if mask is not None and mask.device != batch.device:
            raise ValueError(
                f"next_visual_mask: expected it on {batch.device}, as the batch, got {mask.device}"
            )
        if training and not again:
            self._keep(batch, mask)
        return mask

    def _entry(self, batch: Tensor) -> Kept | None:
        """The entry of this batch, found by its memory: a reentrant checkpoint detaches it."""
        for entry in self.kept:
            known = entry.batch()
            if known is None or (known.dtype, known.device) != (batch.dtype, batch.device):
                continue
            if known.is_set_to(batch):
                return entry
        return None

    def _keep(self, batch: Tensor, mask: Tensor | None) -> None:
        before = self._entry(batch)
        if before is None and mask is None:
            return
        is_clear = before is None or before.is_found or before.mask is mask
        others = [x for x in self.kept if x is not before and x.batch() is not None]
        self.kept = [*others, Kept(weakref.ref(batch), mask, is_clear)]

    def _find(self, batch: Tensor) -> Tensor | None:
        entry = self._entry(batch)
        if entry is None:
            return None
        if not entry.is_clear:
            raise ValueError(
                "next_visual_mask: backward runs a call again, and several calls with the same "
                "input had different masks; set it within the function that is checkpointed"
            )
        entry.is_found = True
        return entry.mask
