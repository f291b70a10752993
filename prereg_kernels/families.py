# SPDX-License-Identifier: Apache-2.0
"""The old place of `prereg_kernels.attach.families`: its names, and a DeprecationWarning."""

import warnings

from prereg_kernels.attach.families import FAMILIES
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.resolver import find_family

__all__ = ["FAMILIES", "Family", "find_family"]

warnings.warn(
    "prereg_kernels.families has moved: import Family from prereg_kernels, FAMILIES from "
    "prereg_kernels.attach.families, find_family from prereg_kernels.attach.resolver",
    DeprecationWarning,
    stacklevel=2,
)
