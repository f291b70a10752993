"""A forward pass of a model with PRe attached, as its hooks know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.images import Images


@dataclass
class Pass:
    """What one forward pass of the model needs to remember; gone when it ends."""

    inputs: Mapping[str, Any]
    training: bool
    denominator: float | Tensor | None
    index: Tensor  # (N,) visual positions in the flattened batch; or, in a graph, the mask of them
    values: dict[int, Tensor]  # per layer, where its loss will be
    again: bool = False  # it has been counted, and backward brings back what its graph needs
    chosen: Tensor | None = None  # (K,) of them, by which L_PRe is estimated; None: all
    images: Images | None = None  # with level="global"
    encoded: list[Tensor] = field(default_factory=list)  # what entered the projector
    # (batch, positions, A), or a row for each of those that L_PRe reads
    anchor: Tensor | None = None
    pooled: dict[int, Tensor] = field(default_factory=dict)  # per layer, (images, D)
    losses: dict[int, Tensor] = field(default_factory=dict)  # per layer, 0-dim
    reached: set[str] = field(default_factory=set)  # by backward, as Record has it

    @property
    def tokens(self) -> Tensor:
        """0-dim, float32: the visual tokens."""
        if self.index.dtype == torch.bool:
            return self.index.sum(dtype=torch.float32)
        return torch.full((), float(self.index.numel()), device=self.index.device)
