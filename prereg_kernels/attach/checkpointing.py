"""Gradient checkpointing: stepping out of it, and telling whether backward runs something again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from prereg_kernels._util import private


@contextmanager
def outside_checkpoint() -> Iterator[None]:
    """Within the innermost non-reentrant checkpoint: save for backward as its caller would.

    That is by reference, or as the hooks around the checkpoint have it, such as `save_on_cpu`. The
    recomputation then stops before what is saved here. Elsewhere this changes nothing.
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
    """Within selective checkpointing: unseen by it.

    Its recomputation expects the ops of the first run one by one, and PRe's differ: backward shows
    the tap no visual token. Elsewhere this changes nothing.
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
    """Whether a layer of transformers is checkpointed with its hooks.

    From 5.24 on its forward is, which leaves hooks outside.
    """
    by_call = type(layer).__call__ is not nn.Module.__call__
    return by_call and bool(getattr(layer, "gradient_checkpointing", False))


def is_in_backward() -> bool:
    """Whether autograd is running this, as checkpoints do that compute something again."""
    return private.current_autograd_node() is not None


def is_recomputation() -> bool:
    """Whether a checkpoint around the model's call runs it again in backward, for its graph.

    Not so with use_reentrant=True, where the call in backward is the first one with grad.
    """
    node = private.current_autograd_node()
    return node is not None and node.name() != private.REENTRANT_NODE
