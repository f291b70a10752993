# SPDX-License-Identifier: Apache-2.0
"""Heads: PRe's heads as a module of the model, whose state has the number of training passes too.

`token_fraction` draws by that number, so whatever brings the heads back has to bring it back as
well: `state_dict` and `load_state_dict`, by which Accelerate, FSDP, DeepSpeed and
torch.distributed.checkpoint save and load. It is neither a parameter nor a buffer. A buffer on a
GPU would have to be read back for each draw, and one on the CPU is nothing that DDP can broadcast
over NCCL.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels._util import distributed
from prereg_kernels._util.private import EXTRA_STATE

PASSES = EXTRA_STATE


class Heads(nn.ModuleDict):
    """The heads by name. Their `owner`, the state of PRe, has the number of training passes."""

    def __init__(self, heads: Mapping[str, nn.Module], owner: Any) -> None:
        super().__init__(heads)
        self._owner = owner

    def get_extra_state(self) -> Tensor:
        """The number of passes, as a 0-dim int64 Tensor.

        safetensors keeps only tensors, and FSDP2's loaders ask for a mesh.
        """
        passes = torch.tensor(self._owner.passes, device="cpu")
        like = next(chain(self.parameters(), self._owner.model.parameters()), None)
        return distributed.replicated(passes, like) if distributed.is_sharded(like) else passes

    def set_extra_state(self, state: Tensor) -> None:
        """Take the number of passes from `load_state_dict`."""
        if not state.is_meta:
            self._owner.passes = int(distributed.whole(state))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        has_heads = any(name.startswith(prefix) for name in state_dict)
        if has_heads or next(self.parameters(), None) is None:
            state_dict.setdefault(
                prefix + PASSES, self.get_extra_state()
            )  # states of before it was there
        super()._load_from_state_dict(state_dict, prefix, *args)
