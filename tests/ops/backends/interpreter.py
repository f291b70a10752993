# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter compute what a GPU would. Import it where TRITON_INTERPRET is set.

As it comes, it truncates to bfloat16, and it skips assertions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Round to the nearest bfloat16, and check assertions."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, debug=True, sanitize_overflow=False)
    interpreter.InterpreterBuilder.cast_impl = _cast


_cast_as_it_comes = interpreter.InterpreterBuilder.cast_impl


def _cast(self: Any, source: Any, dtype: Any) -> Any:
    if dtype.scalar != tl.bfloat16 or source.dtype.scalar not in (tl.float32, tl.float64):
        return _cast_as_it_comes(self, source, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
    data = rounded.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape)
    return interpreter.TensorHandle(data, dtype.scalar)
