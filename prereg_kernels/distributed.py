"""What PRe asks of torch.distributed, where it is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_running() -> bool:
    """Whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Of this process; 0 without torch.distributed."""
    return torch.distributed.get_rank() if is_running() else 0


def copies(model: Any) -> int:
    """How many ranks get the same batch: those of a tensor-parallel group."""
    return getattr(model, "tp_size", None) or 1


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor, as FSDP2 makes of parameters."""
    return type(x).__name__ == "DTensor"  # by name: its module is not in every build of torch


def whole(x: Any) -> Tensor:
    """The whole of what may be a DTensor; then all of its ranks have to call this."""
    return x.full_tensor() if is_sharded(x) else x


def replicated(x: Tensor, like: Any) -> Any:
    """A DTensor that has `x` on each rank of the mesh of the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(x.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim)


def fill(parameter: Any, values: Tensor) -> None:
    """Copy whole values into a parameter that may be a DTensor; then on all of its ranks."""
    values = values.to(parameter.device, parameter.dtype)
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(values)


_SHARDED = {
    "FSDPModule": "fully_shard(model)",
    "ReplicateModule": "replicate(model)",
    "FullyShardedDataParallel": "FullyShardedDataParallel(model)",
}


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if FSDP has taken the model's parameters: it would not see new ones."""
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _SHARDED and kind.__module__.startswith("torch.distributed"):
                raise ValueError(
                    f"model: expected one that is not sharded yet, but {name or 'the model'} is; "
                    "new parameters would not be reduced over ranks. Call apply_pre(model) before "
                    f"{_SHARDED[kind.__name__]}"
                )
    if any(name.endswith("_flat_param") for name, _ in model.named_parameters()) or (
        model._modules and not any(True for _ in model.parameters())
    ):
        raise ValueError(
            "model: expected one with parameters of its own, but FSDP holds them; call "
            "apply_pre(model) before FullyShardedDataParallel(model)"
        )
