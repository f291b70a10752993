# SPDX-License-Identifier: Apache-2.0
"""The old place of `prereg_kernels.attach.handle`: its names, and a DeprecationWarning."""

import warnings

from prereg_kernels._util import distributed
from prereg_kernels.attach.anchors import anchor_width, llm_width
from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.handle import ATTRIBUTE, PRe, find_pre, get_pre
from prereg_kernels.attach.image_spans import check_images, count_images
from prereg_kernels.attach.passes import Record
from prereg_kernels.attach.saving import heads_of
from prereg_kernels.attach.state import HEADS
from prereg_kernels.attach.storage import (
    PRE_DIR,
    Saved,
    check_settings,
    check_shapes,
    load_heads,
    save_heads,
)
from prereg_kernels.ops.head import PReHead

__all__ = [
    "ATTRIBUTE",
    "HEADS",
    "PRE_DIR",
    "Family",
    "PRe",
    "PReConfig",
    "PReHead",
    "Record",
    "Saved",
    "anchor_width",
    "check_images",
    "check_settings",
    "check_shapes",
    "count_images",
    "distributed",
    "find_pre",
    "get_pre",
    "heads_of",
    "llm_width",
    "load_heads",
    "save_heads",
]

warnings.warn(
    "prereg_kernels.handle has moved: import PRe and find_pre from prereg_kernels, the rest from "
    "prereg_kernels.attach.handle",
    DeprecationWarning,
    stacklevel=2,
)
