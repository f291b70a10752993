"""Gradient checkpointing: what is held anyway need not be computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
