# SPDX-License-Identifier: Apache-2.0
"""What kind of GPU a device is."""

from __future__ import annotations

import torch


def nvidia_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability; None for AMD's GPUs, whose numbers mean something else: an MI300's
    (9, 4) is no Hopper's."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor
