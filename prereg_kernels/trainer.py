# SPDX-License-Identifier: Apache-2.0
"""The old place of `prereg_kernels.trainers`: its names, and a DeprecationWarning."""

import warnings

from prereg_kernels.attach.handle import PRe, find_pre
from prereg_kernels.attach.saving import heads_of
from prereg_kernels.attach.state import HEADS
from prereg_kernels.attach.storage import PRE_DIR
from prereg_kernels.trainers import PreTrainer, PreTrainerMixin
from prereg_kernels.trainers.trainer import logger

__all__ = [
    "HEADS",
    "PRE_DIR",
    "PRe",
    "PreTrainer",
    "PreTrainerMixin",
    "find_pre",
    "heads_of",
    "logger",
]

warnings.warn(
    "prereg_kernels.trainer has moved: import PreTrainer and PreTrainerMixin from "
    "prereg_kernels.trainers",
    DeprecationWarning,
    stacklevel=2,
)
