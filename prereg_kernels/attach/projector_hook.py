# SPDX-License-Identifier: Apache-2.0
"""The hook on the projector, which also sees the copies that PEFT makes of it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from prereg_kernels.attach.hooks import Hooks


class ProjectorHook:
    """Shows PRe what enters the projector.

    PEFT trains a copy of a module that is named in `modules_to_save`, and a copy has its module's
    hooks. Here it is the same hook. One that was copied, too, would take the whole model with it,
    and PRe would see nothing of the call.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hooks.see_projector((args or tuple(kwargs.values()))[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectorHook:
        if id(self._hooks.model) not in memo:  # the projector by itself
            return self
        return ProjectorHook(copy.deepcopy(self._hooks, memo))
