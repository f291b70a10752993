# SPDX-License-Identifier: Apache-2.0
"""A dispatch mode in which numbers of floating point have no data, and integers are real.

So a model on the meta device runs its own forward: what depends on ids, grids and masks is there,
and costs nothing; what depends on weights has a shape alone. Where a choice hangs on such a number,
everything counts as chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prereg_kernels._util import private

aten = torch.ops.aten
META = torch.device("meta")
FACTORIES = {
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.empty.memory_format,
    aten.zeros.default, aten.ones.default, aten.full.default, aten.randint.default,
    aten.scalar_tensor.default, aten.eye.default, aten.tril_indices.default,
}  # fmt: skip
_ONES = {(True, False): 1.0, (False, True): True, (False, False): 1}
"""{whether a number without data is of floating point, whether it is a bool: what it counts as}."""


class RealIntegers(private.DispatchMode):
    """Tensors of integers and bools are on the CPU, whatever device is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator, on the device that its arguments ask for."""
        if func in FACTORIES or func is private.TO_COPY:
            return self._made(func, args, kwargs)
        tensors = [x for x in private.leaves_of((args, kwargs)) if isinstance(x, Tensor)]
        if all(not x.is_meta for x in tensors):
            if kwargs.get("device") == META:
                return self._made(func, args, kwargs)
            if func is aten.histc.default:  # which CPUs have of floating point alone
                return func(args[0].float(), *args[1:], **kwargs)
            return func(*args, **kwargs)
        if func is private.ITEM:
            return _ONES[args[0].dtype.is_floating_point, args[0].dtype == torch.bool]
        if func is aten.nonzero.default:
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func in (aten.equal.default, aten.is_nonzero.default):
            return True
        if func is aten.masked_select.default:
            count = args[0].numel() if args[1].is_meta else int(args[1].expand_as(args[0]).sum())
            return args[0].new_empty(count)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], _numbered(args[0], args[1]), *args[2:])
        result = func(*private.with_leaves(_to_meta, args), **private.with_leaves(_to_meta, kwargs))
        if func is aten.topk.default:
            return result[0], _even(result[1], args[0].shape[args[2] if len(args) > 2 else -1])
        return result

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        asked = kwargs.get("device")
        if asked is None or torch.device(asked) != META:
            if asked is None or not any(isinstance(x, Tensor) and x.is_meta for x in args):
                return func(*args, **kwargs)
            return func(*args, **{**kwargs, "device": META})  # what has no data cannot leave
        dtype = kwargs.get("dtype")
        if dtype is None and isinstance(args[0], Tensor):
            dtype = args[0].dtype
        if dtype is None:
            dtype = func(*args, **{**kwargs, "device": META}).dtype
        source = args[0] if isinstance(args[0], Tensor) else None
        if dtype.is_floating_point or dtype.is_complex or (source is not None and source.is_meta):
            return func(*private.with_leaves(_to_meta, args), **kwargs)
        return func(*args, **{**kwargs, "device": torch.device("cpu")})


def _even(indices: Tensor, count: int) -> Tensor:
    """Choices of the router of a mixture of experts: all of them as often as each other."""
    return (torch.arange(indices.numel()) % count).view(indices.shape)


def _to_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) and not value.is_meta else value


def _numbered(tensor: Tensor, indices: Any) -> list[Any]:
    """Indices in place of masks; all of them where a mask has no data."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            if index.is_meta:
                found += list(torch.zeros(index.dim(), index.numel(), dtype=torch.int64).unbind())
            else:
                found += list(index.nonzero().unbind(1))
        else:
            found.append(index)
    return found
