# SPDX-License-Identifier: Apache-2.0
"""Fused kernels and training tools for Predictive Regularization (PRe) of multimodal LLMs.

The method: arXiv 2603.20808, "predictive regularization" of the visual tokens' middle-layer states.
"""

from typing import TYPE_CHECKING, Any

from prereg_kernels._version import __version__
from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.handle import PRe, find_pre
from prereg_kernels.attach.regularizer import apply_pre, remove_pre
from prereg_kernels.attach.sequence_parallel import SequenceParallel
from prereg_kernels.ops.head import PReHead
from prereg_kernels.ops.loss import fused_pre_loss
from prereg_kernels.ops.reference import eager_pre_loss
from prereg_kernels.ops.tap import pre_tap

if TYPE_CHECKING:
    from prereg_kernels.trainers import PReCallback, PReTrainer, PReTrainerMixin, with_pre

__all__ = [
    "Family",
    "PRe",
    "PReCallback",
    "PReConfig",
    "PReHead",
    "PReTrainer",
    "PReTrainerMixin",
    "SequenceParallel",
    "__version__",
    "apply_pre",
    "eager_pre_loss",
    "find_pre",
    "fused_pre_loss",
    "pre_tap",
    "remove_pre",
    "with_pre",
]


def __getattr__(name: str) -> Any:
    """The trainer with its first use: it imports transformers, which the loss does not need."""
    if name not in ("PReCallback", "PReTrainer", "PReTrainerMixin", "with_pre"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prereg_kernels import trainers

    return getattr(trainers, name)
