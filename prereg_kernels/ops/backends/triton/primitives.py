# SPDX-License-Identifier: Apache-2.0
"""The row primitives as functions of tensors, each of which launches its kernel."""

from prereg_kernels.ops.backends.triton.activation import activate, activation_backward
from prereg_kernels.ops.backends.triton.copy import copy_others
from prereg_kernels.ops.backends.triton.gather import gather_rows
from prereg_kernels.ops.backends.triton.loss import token_losses
from prereg_kernels.ops.backends.triton.scatter import scatter_rows

__all__ = [
    "activate",
    "activation_backward",
    "copy_others",
    "gather_rows",
    "scatter_rows",
    "token_losses",
]
