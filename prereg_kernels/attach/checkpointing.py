# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: how to step out of it, and whether backward runs something again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from prereg_kernels._util import private


@contextmanager
def outside_checkpoint() -> Iterator[None]:
    """Inside this context, tensors are saved as outside of the innermost non-reentrant checkpoint.

    They are saved by reference, or as hooks around the checkpoint save, such as `save_on_cpu`. The
    recomputation then stops before what is saved here. Without a checkpoint nothing changes.
    """
    hooks = private.top_saved_tensors_hooks()
    if hooks is None or hooks[0].__module__ != private.CHECKPOINT:
        yield
        return
    private.pop_saved_tensors_hooks()
    try:
        yield
    finally:
        private.push_saved_tensors_hooks(*hooks)


@contextmanager
def outside_selection() -> Iterator[None]:
    """Inside this context, selective checkpointing does not see the ops.

    Its recomputation expects exactly the ops of the first run. PRe's differ, because in backward
    the tap gets no visual token. Without selective checkpointing nothing changes.
    """
    modes = private.dispatch_modes()
    if not any(map(private.is_selection, modes)):
        yield
        return
    for _ in modes:
        private.pop_dispatch_mode()
    others = [mode for mode in modes if not private.is_selection(mode)]
    for mode in others:
        private.push_dispatch_mode(mode)
    try:
        yield
    finally:
        for _ in others:
            private.pop_dispatch_mode()
        for mode in modes:
            private.push_dispatch_mode(mode)


def is_called_within_checkpoint(layer: nn.Module) -> bool:
    """Whether a layer of transformers is checkpointed together with its hooks.

    From 5.24 on only its forward is checkpointed, which leaves the hooks outside.
    """
    by_call = type(layer).__call__ is not nn.Module.__call__
    return by_call and bool(getattr(layer, "gradient_checkpointing", False))


def is_in_backward() -> bool:
    """Whether a backward pass runs this, as when a checkpoint computes something again."""
    return private.current_autograd_node() is not None


def is_recomputation() -> bool:
    """Whether a checkpoint around the model's call runs it again in backward, for its graph.

    With use_reentrant=True this is False, because the call in backward is the first with grad.
    """
    node = private.current_autograd_node()
    return node is not None and node.name() != private.REENTRANT_NODE
