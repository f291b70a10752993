# SPDX-License-Identifier: Apache-2.0
"""Parallelism: which ranks of a Trainer share tokens, and how their losses add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prereg_kernels._util import private
from prereg_kernels.attach.handle import find_pre
from prereg_kernels.attach.sequence_parallel import SequenceParallel

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class Parallelism(_Base):
    """The part of a PReTrainer that knows data, tensor, context and sequence parallelism.

    accelerate's `parallelism_config` says what accelerate has set up. Ranks share each sequence by
    context parallelism (cp), whose ranks all load whole batches, or by DeepSpeed's Ulysses (sp),
    whose loader deals out parts. For anything else `pre.sequence_parallel` says it.
    """

    @property
    def _shared(self) -> SequenceParallel | None:
        """Which ranks share each sequence."""
        return find_pre(self.model).sequence_parallel

    def _check_parallelism(self) -> None:
        if (
            find_pre(self.model).config.level == "global"
            and self._size("cp") * self._size("sp") > 1
        ):
            raise ValueError(
                "level: 'global' needs whole images on each rank, and context and sequence "
                "parallelism cut them; expected level='patch'"
            )

    def _share_sequences(self) -> None:
        """Tell PRe which ranks do, where accelerate has set that up; it has by the first step."""
        pre = find_pre(self.model)
        if pre.sequence_parallel is not None:
            return
        if self._size("cp") > 1:
            group = self.accelerator.torch_device_mesh["cp"].get_group()
            pre.sequence_parallel = SequenceParallel(group)
        elif self._size("sp") > 1:
            group = private.ulysses_group()
            pre.sequence_parallel = SequenceParallel(group, gradients="summed")

    def _size(self, kind: str) -> int:
        """How many ranks accelerate gives to "tp", "cp" or "sp"."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return getattr(parallelism, f"{kind}_size", None) or 1

    def _counts_parts_of(self) -> SequenceParallel | None:
        """The ranks that have the rest, if passes see a part of what `count_rows` gets; or None."""
        shared = self._shared
        if shared is not None and (shared.shard is not None or self._size("cp") > 1):
            return shared
        return None

    def _alike(self) -> int:
        """How many ranks have the same loss, of the same tokens: those of a tensor-parallel group.

        Or of another group whose gradients are the same.
        """
        shared, size = self._shared, self._size("tp")
        if size == 1 and shared is not None and shared.gradients == "none":
            return shared.size
        return size

    def _copies(self) -> int:
        """How many ranks count each micro-batch."""
        shared, alike = self._counts_parts_of(), self._alike()
        return alike if shared is None or shared.gradients == "none" else alike * shared.size

    def _replicas(self) -> int:
        """How many ranks gradients are averaged over."""
        shared, ranks = self._shared, self._losses()
        is_summed = shared is not None and shared.gradients == "summed"
        return ranks // shared.size if shared is not None and is_summed else ranks

    def _losses(self) -> int:
        """How many ranks have a loss of their own, of other rows or other parts of them."""
        ranks: int = self.accelerator.num_processes // self._alike()
        return ranks

    def _loss_scale(self, items: Any) -> int:
        """The factor by which Trainer multiplies the loss, so that the ranks' average is a sum."""
        known = self.args.average_tokens_across_devices and items is not None
        return self._losses() if known else 1

    def _of_all_parts(self, term: Tensor) -> Tensor:
        """A rank's term, as Trainer has the loss: under Ulysses each rank has that of all parts."""
        shared = self._shared
        if self._size("sp") == 1 or shared is None:
            return term
        from torch.distributed.nn.functional import all_gather

        return torch.stack(all_gather(term, shared.group)).sum()
