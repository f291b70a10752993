# SPDX-License-Identifier: Apache-2.0
"""Shares of the tokens for ranks that have the same hidden states, as in tensor parallelism.

Of N tokens each rank of a group takes ceil(N / size), in the order of the ranks. The head's
gradients are then summed over the group. The hidden states' gradients are rows that the other ranks
lack, so they are gathered. A group's sums are bitwise the same on each of its ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prereg_kernels.ops.arguments import Inputs, is_mask


class Share:
    """This rank's tokens of those that all ranks of the group have.

    Attributes:
        inputs: of the share. anchor: its rows, or whole where they have the shape of `hidden`.
        coefficient: (n,), of its tokens.
        tokens: N.
        index: (N,) int64, of all tokens in the flattened leading dims; None: every position.
    """

    def __init__(
        self, hidden: Tensor, anchor: Tensor, inputs: Inputs, coefficient: Tensor, group: Any
    ) -> None:
        index = inputs.select
        if is_mask(index):
            index = index.nonzero().squeeze(1)
            coefficient = coefficient[index]
        self.index, self._group = index, group
        self.tokens = inputs.slots if index is None else index.shape[0]
        mine = share_of(self.tokens, group)
        if index is None:
            share = torch.arange(mine.start, mine.stop, device=hidden.device)
        else:
            share = index[mine]
            if anchor.shape[:-1] != hidden.shape[:-1]:
                anchor = anchor[mine]
        self.anchor, self.coefficient = anchor, coefficient[mine]
        self.inputs = inputs._replace(select=share, token_weight=None, slots=len(share))

    def rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states (n, D) and the anchors (n, A) of the share."""
        share, anchor = self.inputs.select, self.anchor
        if anchor.shape[:-1] == hidden.shape[:-1]:
            anchor = anchor.reshape(-1, anchor.shape[-1])[share]
        return hidden.reshape(-1, hidden.shape[-1])[share], anchor

    def add_rows(self, dh: Tensor, residual: Tensor | None, like: Tensor) -> Tensor:
        """The gradient of `like`: that of the rest of the network, plus the rows of all ranks.

        Args:
            dh: (n, D), of the share.
        """
        size = dist.get_world_size(self._group)
        each = _rounded_up(self.tokens, size)
        padded = dh.new_zeros(each, dh.shape[1])
        padded[: dh.shape[0]] = dh
        everything = dh.new_empty(size * each, dh.shape[1])
        dist.all_gather_into_tensor(everything, padded, group=self._group)
        rows = everything[: self.tokens]
        whole = torch.zeros_like(like) if residual is None else residual.clone()
        whole = whole.contiguous()
        if self.index is None:
            whole.view(-1, dh.shape[1]).add_(rows)
        else:
            whole.view(-1, dh.shape[1]).index_add_(0, self.index, rows)
        return whole


def share_of(count: int, group: Any) -> slice:
    """The rows of this rank, out of so many that all ranks of the group have."""
    each = _rounded_up(count, dist.get_world_size(group))
    start = min(dist.get_rank(group) * each, count)
    return slice(start, min(start + each, count))


def _rounded_up(count: int, size: int) -> int:
    return -(-count // size)


def sum_over(group: Any, tensors: Sequence[Tensor]) -> None:
    """Sum each of the tensors over the ranks of a group, in place."""
    waiting = [dist.all_reduce(x, group=group, async_op=True) for x in tensors if x.numel()]
    for work in waiting:
        work.wait()


def has_several(group: Any) -> bool:
    """Whether a group has other ranks than this one."""
    return group is not None and dist.get_world_size(group) > 1
