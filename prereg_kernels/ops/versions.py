# SPDX-License-Identifier: Apache-2.0
"""Tensors that backward reads, but that autograd does not save: if they change meanwhile, raise.

Autograd does the same for what it saves, by the number that every write in place counts up.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prereg_kernels._util.private import version_of


def versions_of(*tensors: Tensor | None) -> list[int | None]:
    """Each one's version; None where there is no tensor, or one that counts no writes."""
    return [None if x is None or x.is_inference() else version_of(x) for x in tensors]


def check_versions(before: list[int | None], names: Sequence[str], *tensors: Tensor | None) -> None:
    """Raise RuntimeError, naming the argument, if one was written since `versions_of` saw it."""
    after = versions_of(*tensors)
    if after == before:
        return
    written = [name for name, x, y in zip(names, before, after, strict=True) if x != y]
    raise RuntimeError(
        f"{written[0]}: was modified in place between forward and backward, which reads it; "
        "write to a copy, or after backward"
    )
