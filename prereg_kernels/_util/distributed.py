# SPDX-License-Identifier: Apache-2.0
"""What PRe asks of torch.distributed, where it is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prereg_kernels._util import private


def is_running() -> bool:
    """Whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Of this process; 0 without torch.distributed."""
    return torch.distributed.get_rank() if is_running() else 0


def ranks() -> int:
    """How many processes there are; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if is_running() else 1


def tensor_group(model: Any) -> Any:
    """The process group of the ranks that transformers' tensor parallelism made; or None."""
    mesh = getattr(model, private.DEVICE_MESH, None)
    if mesh is None or tensor_ranks(model) == 1:
        return None
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def tensor_ranks(model: Any) -> int:
    """Over how many ranks transformers' tensor parallelism has split the model."""
    size = getattr(model, "tp_size", None)
    if size is None and getattr(model, private.DEVICE_MESH, None) is not None:
        # transformers 5.16 leaves it so on a model that it has split
        size = getattr(getattr(model.config, "distributed_config", None), "tp_size", None)
    return size or 1


def size_of(group: Any) -> int:
    """How many ranks a process group has; None has this one."""
    return 1 if group is None else torch.distributed.get_world_size(group)


class Held:
    """A process group that copies share and pickles leave out."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> Held:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return nothing, ()


def nothing() -> None:
    """What a pickle has in the place of something that belongs to its process."""


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor, as FSDP2 makes of parameters."""
    return type(x).__name__ == "DTensor"  # by name: its module is not in every build of torch


def is_partitioned(x: Any) -> bool:
    """Whether `x` is a parameter that DeepSpeed's ZeRO-3 has made or taken."""
    return hasattr(x, "ds_id")


def whole(x: Any) -> Tensor:
    """The whole of what may be a DTensor; then all of its ranks have to call this."""
    return x.full_tensor() if is_sharded(x) else x


def replicated(x: Tensor, like: Any) -> Any:
    """A DTensor that has `x` on each rank of the mesh of the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(x.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim)


def fill(parameter: Any, values: Tensor, same_everywhere: bool = False) -> None:
    """Copy whole values into a parameter that may be a DTensor; then on all of its ranks.

    Args:
        same_everywhere: each rank has the same values, and keeps its part of them. False: all get
            parts of those of the first, as another might have read another file.
    """
    values = values.to(parameter.device, parameter.dtype)
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        source = None if same_everywhere else 0
        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values, mesh, placements, src_data_rank=source)
    with torch.no_grad():
        parameter.copy_(values)
