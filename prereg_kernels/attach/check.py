# SPDX-License-Identifier: Apache-2.0
"""`PRe.check`: looks at a batch without a training step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prereg_kernels.attach.state import State


def run(state: State, batch: Mapping[str, Any]) -> None:
    """Let the first steps look at the batch (`prereg_kernels.attach.first_steps`); keep nothing."""
    model: nn.Module = state.model
    modes = {module: module.training for module in model.modules()}
    before = state.last, state.loss, state.collected, state.next_mask.mask
    state.is_checking, state.collected, state.last = True, None, None
    try:
        for module in modes:  # and not by eval(), which may do more, and which nothing undoes
            module.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**batch)
        if state.last is None or not bool(state.last.tokens):
            warnings.warn(
                "PRe: the batch has no visual token, so nothing was compared; expected one with "
                "images",
                stacklevel=3,
            )
    finally:
        state.is_checking = False
        state.last, state.loss, state.collected, state.next_mask.mask = before
        for module, mode in modes.items():
            module.training = mode
