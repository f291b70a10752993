# SPDX-License-Identifier: Apache-2.0
"""The checkup's measures of tensors on the GPU are those on the CPU."""

from __future__ import annotations

import pytest

from tests.checkup.test_streaming import MEASURES, each_measure, features, numbers
from tests.gpu.support import DEVICE, needs_gpu

pytestmark = needs_gpu


@each_measure
def test_equals_the_cpu(name: str) -> None:
    once = MEASURES[name][1]
    x, reference = features()
    got = numbers(once(x.to(DEVICE), reference.to(DEVICE)))
    assert got == pytest.approx(numbers(once(x, reference)), rel=1e-6)
