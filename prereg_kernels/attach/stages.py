# SPDX-License-Identifier: Apache-2.0
"""Pipeline stages, which PRe refuses: each rank has only some of the decoder's layers.

The anchor enters the first layer, and the head reads a later one. Both have to be on one rank.
"""

from __future__ import annotations

from torch import nn

SAME_STAGE = (
    "PRe needs what enters the decoder, and all layers up to its own, on one rank, and does not "
    "work across the stages of a pipeline"
)


def check_stage(layers: nn.ModuleList, last: int, count: int) -> None:
    """Check that the layers from the first to number `last` are there.

    Args:
        count: how many layers the decoder has.

    Raises:
        ValueError: this is a stage of a pipeline.
    """
    if len(layers) < count:
        raise ValueError(
            f"model: expected its {count} decoder layers, got {len(layers)} of them; {SAME_STAGE}"
        )
    missing = [number for number, x in enumerate(layers, 1) if isinstance(x, nn.Identity)]
    if missing and missing[0] <= last:
        raise ValueError(
            f"model: expected the decoder layers 1 to {last} on this rank, got nn.Identity in "
            f"place of number {missing[0]}; {SAME_STAGE}"
        )
