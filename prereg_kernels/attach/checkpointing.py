"""Gradient checkpointing: stepping out of it, and telling whether backward runs something again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import _python_dispatch as dispatch
from torch.utils import checkpoint


@contextmanager
def outside_checkpoint() -> Iterator[None]:
    """Within the innermost non-reentrant checkpoint: save for backward as its caller would.

    That is by reference, or as the hooks around the checkpoint have it, such as `save_on_cpu`. The
    recomputation then stops before what is saved here. Elsewhere this changes nothing.
    """
    autograd = torch._C._autograd  # torch has no public name for taking hooks off
    hooks = autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or hooks[0].__module__ != "torch.utils.checkpoint":
        yield
        return
    autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        autograd._push_saved_tensors_default_hooks(*hooks)


@contextmanager
def outside_selection() -> Iterator[None]:
    """Within selective checkpointing: unseen by it.

    Its recomputation expects the ops of the first run one by one, and PRe's differ: backward shows
    the tap no visual token. Elsewhere this changes nothing.
    """
    selections = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    modes = dispatch._get_current_dispatch_mode_stack()
    if not any(isinstance(mode, selections) for mode in modes):
        yield
        return
    for _ in modes:
        dispatch._pop_mode()
    others = [mode for mode in modes if not isinstance(mode, selections)]
    for mode in others:
        dispatch._push_mode(mode)
    try:
        yield
    finally:
        for _ in others:
            dispatch._pop_mode()
        for mode in modes:
            dispatch._push_mode(mode)


def is_in_backward() -> bool:
    """Whether autograd is running this, as checkpoints do that compute something again."""
    return torch._C._current_autograd_node() is not None


def is_recomputation() -> bool:
    """Whether a checkpoint around the model's call runs it again in backward, for its graph.

    Not so with use_reentrant=True, where the call in backward is the first one with grad.
    """
    node = torch._C._current_autograd_node()
    return node is not None and node.name() != "CheckpointFunctionBackward"
