"""Fused kernels and training tools for Predictive Regularization (PRe) of multimodal LLMs.

The method: arXiv 2603.20808, "predictive regularization" of the visual tokens' middle-layer states.
"""

from prereg_kernels._version import __version__
from prereg_kernels.config import PReConfig
from prereg_kernels.handle import find_pre
from prereg_kernels.head import PReHead
from prereg_kernels.loss import fused_pre_loss
from prereg_kernels.reference import eager_pre_loss
from prereg_kernels.regularizer import apply_pre, remove_pre
from prereg_kernels.tap import pre_tap

__all__ = [
    "PReConfig",
    "PReHead",
    "__version__",
    "apply_pre",
    "eager_pre_loss",
    "find_pre",
    "fused_pre_loss",
    "pre_tap",
    "remove_pre",
]
