"""The old place of `prereg_kernels.attach.families`: its names, and a DeprecationWarning."""

import warnings

from prereg_kernels.attach.families import FAMILIES, Family, find_family

__all__ = ["FAMILIES", "Family", "find_family"]

warnings.warn(
    "prereg_kernels.families has moved: import Family from prereg_kernels, FAMILIES and "
    "find_family from prereg_kernels.attach.families",
    DeprecationWarning,
    stacklevel=2,
)
