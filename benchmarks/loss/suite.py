# SPDX-License-Identifier: Apache-2.0
"""What the suites of pytest-benchmark share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from benchmarks.common.machine import machine
from benchmarks.loss.cases import Case
from benchmarks.loss.plans import FLOOR, Plan


def cells(plans: Iterable[Plan], floor: bool = True) -> list[Any]:
    """Parameters `plan, name`: every peer of every plan, after the floor."""
    return [
        pytest.param(plan, name, id=f"{plan}-{name}", marks=[pytest.mark.gpu] * plan.is_of_gpu)
        for plan in plans
        for name in (*[FLOOR] * floor, *plan.peers())
    ]


def describe(device: torch.device, case: Case, name: str, threads: int = 1) -> dict[str, Any]:
    """For extra_info: the machine, and what was timed."""
    return machine(device) | {"threads": threads, "implementation": name, "size": case.name}
