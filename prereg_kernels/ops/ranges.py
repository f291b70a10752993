# SPDX-License-Identifier: Apache-2.0
"""Named ranges for a profiler: each stage and each row primitive of a call, as `prereg::NAME`.

The ops have names already, `prereg::pre_losses` and `prereg::pre_gradients`. What is within them,
all calls of a backend's methods, gets a range while a profiler runs. Without one, a call gets the
backend as it is, after the look at one variable.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch

from prereg_kernels._util import private
from prereg_kernels.ops.backends.base import Backend

PREFIX = "prereg::"
QUESTIONS = {"refuses", "has_wide_products", "bias_left"}  # methods that answer, and do no work
STAGES = tuple(
    name
    for name, member in vars(Backend).items()
    if isinstance(member, FunctionType) and not name.startswith("_") and name not in QUESTIONS
)


def with_ranges(backend: Backend) -> Backend:
    """The backend; while a profiler runs, one that marks its stages and does the same."""
    if not private.profiler_runs():
        return backend
    marked = copy.copy(backend)
    marked.__class__ = _marked(type(backend))
    return marked


@cache
def _marked(kind: type[Backend]) -> type[Backend]:
    """A subclass: a stage that calls a primitive calls the marked one."""
    return type(kind.__name__, (kind,), {name: _in_range(getattr(kind, name)) for name in STAGES})


def _in_range(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any) -> Any:
        with torch.profiler.record_function(PREFIX + method.__name__):
            return method(*arguments)

    return call
