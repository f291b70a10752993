# SPDX-License-Identifier: Apache-2.0
"""SequenceParallel: ranks that share each sequence of a batch, and the part that this rank has.

Each rank of the group runs some positions of every row through the decoder's layers, as in Ulysses,
ring attention and context parallelism. L_PRe is a sum over tokens, so each rank computes the sum
over its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prereg_kernels._util import distributed

Order = Literal["contiguous", "zigzag"]
Gradients = Literal["averaged", "summed", "none"]

WHOLE_ROWS = (
    "The decoder's sequence is a part of it, as under sequence and context parallelism; say which: "
    "pre.sequence_parallel = SequenceParallel(group, shard=...), or set pre.next_visual_mask "
    "before each call to a mask of this rank's part"
)


@dataclass(frozen=True, eq=False)
class Part:
    """The part of a batch's rows that this rank has.

    Attributes:
        shape: (rows, length) of it.
        numbers: of that shape, int64: positions in the flattened whole; -1: padding.
        index: (n,), the visual positions in the flattened part; in a graph, the mask of them.
        place: (n,), their numbers among the visual tokens of the whole; in a graph, of no use.
    """

    shape: torch.Size
    numbers: Tensor
    index: Tensor
    place: Tensor

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part, (rows, length, ...), of a whole tensor; padding is like position 0."""
        numbers = self.numbers.clamp(min=0).to(whole.device)
        return whole.flatten(0, 1)[numbers]


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """How the ranks of a group share each sequence: `PRe.sequence_parallel`.

    Example:
        >>> SequenceParallel(None, shard="zigzag").shard
        'zigzag'

    Attributes:
        group: the process group of these ranks. None: all ranks.
        shard: which part of whole rows this rank's decoder gets. None: the call gets the rank's
            part already, ids and all. "contiguous": `size` equal parts in the order of the ranks.
            "zigzag": of 2 * size parts, rank r has numbers r and 2 * size - 1 - r. Both pad at the
            end. Or the function by which your code splits `position_ids`: it takes an int64 Tensor,
            (rows, length), returns this rank's part of it, and pads with 0.
        gradients: what your trainer does with the parameters' gradients over the group.
            "averaged": as DDP and FSDP do. "summed". "none": as in sequence-parallel regions of
            tensor parallelism, where PRe itself sums its heads' gradients.
    """

    group: Any
    shard: Order | Callable[[Tensor], Tensor] | None = None
    gradients: Gradients = "averaged"

    def __post_init__(self) -> None:
        if self.shard not in (None, *get_args(Order)) and not callable(self.shard):
            raise ValueError(
                f"shard: expected 'contiguous', 'zigzag', a function or None, got {self.shard!r}"
            )
        if self.gradients not in get_args(Gradients):
            raise ValueError(
                f"gradients: expected one of {get_args(Gradients)}, got {self.gradients!r}"
            )

    def __deepcopy__(self, memo: Any) -> SequenceParallel:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return distributed.nothing, ()

    @property
    def size(self) -> int:
        """How many ranks share a sequence."""
        return torch.distributed.get_world_size(self.group)

    def denominator(self, count: Tensor) -> Tensor:
        """The denominator that makes the group's gradient the mean over all of its `count` rows."""
        return count / self.size if self.gradients == "averaged" else count

    def total(self, count: Tensor) -> Tensor:
        """The sum of the ranks' own counts."""
        torch.distributed.all_reduce(count, group=self.group)
        return count

    def part_of(self, mask: Tensor, *, in_graph: bool = False) -> Part:
        """This rank's part of whole rows.

        Args:
            mask: bool, (rows, length), their visual positions. in_graph: see `Part`.

        Raises:
            TypeError, ValueError: `shard` gives no part of the positions.
        """
        numbers = self._numbers(mask)
        inside = numbers >= 0
        flat = mask.flatten()
        own = inside & flat[numbers.clamp(min=0)]
        if in_graph:
            return Part(numbers.shape, numbers, own, numbers)
        index = own.flatten().nonzero().squeeze(1)
        place = (flat.cumsum(0) - 1)[numbers.flatten()[index]]
        return Part(numbers.shape, numbers, index, place)

    def _numbers(self, mask: Tensor) -> Tensor:
        rows, length = mask.shape
        numbers = torch.arange(1, mask.numel() + 1, device=mask.device).view(rows, length)
        if callable(self.shard):
            own = self.shard(numbers)
            _check_part(own, numbers)
            return own.to(mask.device) - 1
        rank, size = torch.distributed.get_rank(self.group), self.size
        pieces = size if self.shard == "contiguous" else 2 * size
        each = -(-length // pieces)
        padded = torch.nn.functional.pad(numbers, (0, each * pieces - length)) - 1
        mine = (rank,) if self.shard == "contiguous" else (rank, 2 * size - 1 - rank)
        return torch.cat([padded[:, x * each : (x + 1) * each] for x in mine], dim=1)


def _check_part(own: Any, numbers: Tensor) -> None:
    """Check what a function made of the numbers of all positions, which begin at 1."""
    if not isinstance(own, Tensor) or own.dtype != torch.int64 or own.dim() != 2:
        came = f"{own.dtype}, {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
        raise TypeError(
            f"shard: expected the function to return an int64 Tensor, (rows, length), got {came}"
        )
    if torch.compiler.is_compiling() or own.device.type != "cpu":  # looking would wait for it
        return
    found, counts = own[own != 0].unique(return_counts=True)
    if bool((found < 0).any() | (found > numbers.numel()).any() | (counts > 1).any()):
        raise ValueError(
            "shard: expected the function to return each position once at most, and 0 where it "
            "pads; got others, or some of them twice"
        )
