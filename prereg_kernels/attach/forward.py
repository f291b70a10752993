# SPDX-License-Identifier: Apache-2.0
"""ModelForward: the model's `forward` while PRe is attached; and what a call's arguments say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from prereg_kernels.attach.hooks import Hooks


class ModelForward:
    """Replaces the model's `forward`, and begins a pass unless a hook has begun one.

    Hooks run when the model is called. `model.forward(...)` bypasses them, and so does PEFT before
    0.21. Hooks are needed as well, because other code may replace this `forward` by its own.
    """

    def __init__(self, hooks: Hooks, before: Any) -> None:
        self._hooks = hooks
        self._before = before  # a forward of this model's own, in place of its class's

    @property
    def _original(self) -> Any:
        model = self._hooks.model
        return self._before or type(model).forward.__get__(model)

    @property
    def __signature__(self) -> inspect.Signature:
        """Trainers and `generate` look at the arguments."""
        return inspect.signature(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hooks = self._hooks
        by_hook = not hooks.is_attached or hooks.claim()
        try:
            if not by_hook:
                hooks.begin(hooks.model, args, kwargs)
                hooks.claim()
            output = self._original(*args, **kwargs)
        except BaseException as error:
            # The hook's end comes after an Exception, but not after Ctrl-C
            if not by_hook or not isinstance(error, Exception):
                hooks.end(hooks.model, args, None)
            raise
        ours = None if by_hook else hooks.end(hooks.model, args, output)
        return output if ours is None else ours


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of what its forward takes."""
    return tuple(inspect.signature(module.forward).parameters)


# What a call gets of the tokens before it: since transformers 5.24, and before
CACHES = ("cache", "past_key_values")


def goes_on(inputs: Mapping[str, Any]) -> bool:
    """Whether these are tokens that generation appends: none is visual, whatever its id."""
    caches: list[Any] = [inputs.get(name) for name in CACHES]
    return any(hasattr(x, "get_seq_length") and bool(x.get_seq_length()) for x in caches)


def was_encoded(inputs: Mapping[str, Any]) -> bool:
    """Whether images were encoded before the call, as `generate` of transformers 5.24 does."""
    return bool(inputs.get("mm_encoder_outputs"))
