# SPDX-License-Identifier: Apache-2.0
"""The machine that the suites of this process run on, found out once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from prereg_kernels._util.machine import describe_machine


@cache
def machine(device: torch.device) -> dict[str, Any]:
    """Names and versions, the commit, and what instructions torch uses on the CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return describe_machine(device, None) | {"capability": capability}
