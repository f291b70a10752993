"""What PRe asks of torch.distributed, where it is there."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


def is_running() -> bool:
    """Whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Of this process; 0 without torch.distributed."""
    return torch.distributed.get_rank() if is_running() else 0


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor, as FSDP2 makes of parameters."""
    return type(x).__name__ == "DTensor"  # by name: its module is not in every build of torch


def is_partitioned(x: Any) -> bool:
    """Whether `x` is a parameter that DeepSpeed's ZeRO-3 has made or taken."""
    return hasattr(x, "ds_id")


def whole(x: Any) -> Tensor:
    """The whole of what may be a DTensor; then all of its ranks have to call this."""
    return x.full_tensor() if is_sharded(x) else x


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


class Home:
    """The model that a head is in, without keeping it alive; None in a copy of the head alone."""

    def __init__(self, model: nn.Module | None) -> None:
        self._reference = None if model is None else weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> Home:
        return Home(memo.get(id(self.model)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Home, (None,)


def check_unit(model: nn.Module, head: nn.Module) -> None:
    """Check the unit that `fully_shard` has put a head of this model into.

    Raises:
        ValueError: other parameters that train there have another dtype, which torch would refuse
            in the first forward pass.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    path: list[nn.Module] = [model]
    name = next(name for name, module in model.named_modules() if module is head)
    for part in name.split("."):
        path.append(getattr(path[-1], part))
    # Where none has a state the unit's root is around the model
    state_of: Any = fully_shard.state  # type: ignore[attr-defined]
    root = next((x for x in reversed(path) if state_of(x) is not None), model)
    unit, waiting = [], [root]
    while waiting:
        module = waiting.pop()
        unit.append(module)
        waiting += [child for child in module.children() if not isinstance(child, FSDPModule)]
    trained = [p for x in unit for p in x.parameters(recurse=False) if p.requires_grad]
    own = {p.dtype for p in head.parameters()}
    others = {p.dtype for p in trained} - own
    if head in unit and others:
        raise ValueError(
            f"pre.heads: fully_shard puts parameters of one dtype into a unit, got heads in "
            f"{_names(own)} among parameters in {_names(others)}; before fully_shard(model, ...), "
            "call fully_shard(head, ...) with the same options for each head in "
            "set(pre.heads.values()); Accelerate does so unless "
            "fsdp_transformer_layer_cls_to_wrap is set: then add PReHead to it. Or give the heads "
            "the others' dtype: apply_pre(model, head_dtype=...)"
        )


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
