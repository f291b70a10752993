# SPDX-License-Identifier: Apache-2.0
"""Masks that are made of COCO's polygons are larger than the objects.

Polygons were drawn five times as large by a library that fills their outlines too, so thin objects
grew. They are drawn by pycocotools now, as in COCO's evaluations. Then the mask's area, averaged
over where the pixels lie, is the polygon's.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from prereg_kernels.checkup.images.coco import decode

STRIP = [(5, 5), (25, 11), (24.8, 11.6), (4.8, 5.6)]
STAR = [
    (16 + r * math.sin(0.2 + k * math.pi / 5), 16 + r * math.cos(0.2 + k * math.pi / 5))
    for k, r in enumerate(5 * (10, 4))
]


def shoelace(points: list[tuple[float, float]]) -> float:
    ends = zip(points, points[1:] + points[:1], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in ends)) / 2


@pytest.mark.parametrize("points", [STRIP, STAR], ids=["strip", "star"])
def test_the_mean_area_is_the_polygons(points: list[tuple[float, float]]) -> None:
    steps = 25
    areas = [
        decode([[v for x, y in points for v in (x + i / steps, y + j / steps)]], (32, 32)).sum()
        for i in range(steps)
        for j in range(steps)
    ]
    assert np.mean(areas) == pytest.approx(shoelace(points), rel=0.005)
