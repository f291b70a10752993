# SPDX-License-Identifier: Apache-2.0
"""What a prediction and a target can be normalised by, row by row: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalized(x: Tensor, normalize: str, eps: float) -> Tensor:
    """x (n, A) with rows of length 1 ("l2"), of zero mean and unit variance ("layer"), or x."""
    if normalize == "l2":
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    if normalize == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return x
