# SPDX-License-Identifier: Apache-2.0
"""Cases for this machine's CPU."""

from __future__ import annotations

import torch

from benchmarks.loss.cases import Case

CPU = torch.device("cpu")


def cpu_case(tokens: int, width: int, dtype: torch.dtype) -> Case:
    """N visual tokens, and no text, with D = M = A features."""
    name = f"N={tokens} D={width} {str(dtype).removeprefix('torch.')}"
    return Case(name, tokens, (width,) * 3, dtype, dtype, text=False)
