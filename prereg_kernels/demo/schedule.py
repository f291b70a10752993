# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak rate at `step` of `steps` (from 0): a linear rise over `warmup` steps,
    then a cosine that reaches 0 just after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
