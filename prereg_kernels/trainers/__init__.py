"""PRe in a trainer: transformers' Trainer with exact means, figures and checkpoints."""

from prereg_kernels.trainers.trainer import PReTrainer, PReTrainerMixin

# The names of version 0.1
PreTrainer, PreTrainerMixin = PReTrainer, PReTrainerMixin

__all__ = ["PReTrainer", "PReTrainerMixin", "PreTrainer", "PreTrainerMixin"]
