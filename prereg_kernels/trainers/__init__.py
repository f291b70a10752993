# SPDX-License-Identifier: Apache-2.0
"""PRe in a trainer: transformers' Trainer with exact means, figures and checkpoints."""

from prereg_kernels.trainers.attaching import with_pre
from prereg_kernels.trainers.callback import PReCallback
from prereg_kernels.trainers.trainer import PReTrainer, PReTrainerMixin

# The names of version 0.1
PreTrainer, PreTrainerMixin = PReTrainer, PReTrainerMixin

__all__ = [
    "PReCallback",
    "PReTrainer",
    "PReTrainerMixin",
    "PreTrainer",
    "PreTrainerMixin",
    "with_pre",
]
