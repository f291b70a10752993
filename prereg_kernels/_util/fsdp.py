# SPDX-License-Identifier: Apache-2.0
"""What FSDP makes of a model with PRe: which unit a head is in, and whether it came too late."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from prereg_kernels._util import private

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
                    f"{_SHARDED[kind.__name__]}; where a loader shards what it loads, between its "
                    "making of the model and that call"
                )
    if any(name.endswith(private.FLAT_PARAMETER) for name, _ in model.named_parameters()) or (
        private.submodules(model) and not any(True for _ in model.parameters())
    ):
        raise ValueError(
            "model: expected one with parameters of its own, but FSDP holds them; call "
            "apply_pre(model) before FullyShardedDataParallel(model)"
        )


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


def check_shared(head: nn.Module) -> None:
    """Raise ValueError if the head of several layers is a unit of FSDP2's, in a reentrant second
    run: torch (2.13) then reduces the gradients of some of its calls alone."""
    if any(kind.__name__ == "FSDPModule" for kind in type(head).__mro__):
        raise ValueError(
            "share_head: reentrant checkpointing and fully_shard make wrong gradients of a head of "
            "several layers that is a unit of its own; expected use_reentrant=False, or PReHead "
            "left out of what is wrapped"
        )


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
