# SPDX-License-Identifier: Apache-2.0
"""The loss on tensors alone: the public functions, their definition, the algorithm, backends."""

from prereg_kernels.ops.activations import Activation, register_activation
from prereg_kernels.ops.losses import Loss, register_loss

__all__ = ["Activation", "Loss", "register_activation", "register_loss"]
