# SPDX-License-Identifier: Apache-2.0
"""The keyword arguments of the loss and of the tap, for signatures that pass them on.

`fused_pre_loss` and `pre_tap` spell them out again; a test holds both equal.
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from prereg_kernels.ops.backends.registry import BackendName
from prereg_kernels.ops.losses import Loss, LossName
from prereg_kernels.ops.names import LayoutName, NormalizationName, ReductionName
from prereg_kernels.ops.probe import TapProbe


class _Options(TypedDict, total=False):
    visual_mask: Tensor | None
    visual_index: Tensor | None
    token_weight: Tensor | None
    layout: LayoutName
    loss: LossName | Loss
    normalize: NormalizationName
    denominator: float | Tensor | None
    eps: float
    chunk_rows: int | None
    backend: BackendName


class LossOptions(_Options, total=False):
    """The options of `fused_pre_loss`, without the head's activation."""

    reduction: ReductionName
    recompute: bool


class TapOptions(_Options, total=False):
    """The options of `pre_tap`, without the head's activation."""

    compute_value: bool
    value_out: Tensor | None
    carry: float | Tensor | None
    carry_always: bool
    group: Any
    same_hidden: bool
    probe: TapProbe | None
