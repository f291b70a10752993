# SPDX-License-Identifier: Apache-2.0
"""What the experiment's pictures say without their text."""

from __future__ import annotations

import json
from pathlib import Path

from prereg_kernels.checkup.report.style import theme
from prereg_kernels.demo.experiment.plots import probes
from prereg_kernels.demo.experiment.summary import Results

DEMO = Path(__file__).parents[2] / "benchmarks" / "results" / "demo.json"


def test_probes_have_one_scale_and_name_their_bands() -> None:
    demo = json.loads(DEMO.read_text())
    results = Results(demo["results"])
    with theme("light") as colours:
        drawing = probes(results, 4, colours)
    [(low, high)] = {axis.get_ylim() for axis in drawing.panels}
    every = [
        100 * value
        for result in demo["results"]
        for name in ("digit", "polarity", "tilt", "texture", "thickness")
        for value in result["probe"][name]
    ]
    assert low <= min(every) and max(every) <= high == 100
    [legend] = drawing.figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[-2:] == ["band: ± the standard deviation over seeds", "the layer with PRe"]
