# SPDX-License-Identifier: Apache-2.0
"""The table of measures: its entries fit together, and one entry is enough to be everywhere."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prereg_kernels.checkup import MeanSums, patch_structure, token_norms
from prereg_kernels.checkup.intervals import Bootstrap, Estimate
from prereg_kernels.checkup.measures import table
from prereg_kernels.checkup.measures.measure import (
    DEMO,
    STATES,
    SWEEP,
    Counted,
    Measure,
    PerImage,
    Tokens,
)
from prereg_kernels.checkup.measures.sources import per_token
from prereg_kernels.checkup.measures.table import MEASURES, PANELS, at_layer
from prereg_kernels.checkup.report import findings, plots
from prereg_kernels.checkup.report.style import theme
from prereg_kernels.demo.experiment.summary import measures_in

D = 12
IMAGES = torch.arange(5).repeat_interleave(torch.tensor([4, 9, 6, 6, 5]))


def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(0)
    x, inputs = torch.randn(2, len(IMAGES), D, generator=generator).unbind()
    objects = torch.arange(len(IMAGES)) % 3 - 1
    return Tokens(x, inputs, IMAGES, 5, objects, mean=MeanSums().update(x).result())


def test_entries_fit_together() -> None:
    assert len({measure.name for measure in MEASURES}) == len(MEASURES)
    assert {measure.panel for measure in MEASURES} - {None} == set(PANELS)
    kept = {m.source for m in MEASURES if isinstance(m.source, (Counted, PerImage))}
    assert max(Counter(source.name for source in kept).values()) == 1
    assert not any("." in source.name for source in kept)  # names in shards are cut there
    for measure in MEASURES:
        if measure.compared is not None:
            assert isinstance(measure.source, PerImage), "without interval nothing is compared"


def test_the_demo_reads_the_definitions() -> None:
    """To the last bit: results of earlier versions stay comparable."""
    read = tokens()
    groups = at_layer(read, DEMO)
    structure = patch_structure(read.features, read.objects, IMAGES)
    assert groups["structure"] == {
        name: getattr(structure, name.replace(" ", "_"))
        for name in (
            "cohesion", "coupling", "difference", "contrast", "centred cohesion",
            "centred coupling", "centred difference", "centred contrast",
        )
    }  # fmt: skip
    states = {
        "cosine to input": float(F.cosine_similarity(read.features, read.inputs, dim=1).mean()),
        "norm": token_norms(read.features).mean,
    }
    assert {name: groups["states"][name] for name in states} == states
    in_demo = {m.name for m in MEASURES if DEMO in m.shown and m.group == STATES}
    assert groups["states"].keys() == in_demo >= states.keys()
    swept = [measure.name for measure in measures_in([groups], SWEEP)]
    assert swept == [m.name for m in MEASURES if SWEEP in m.shown]
    assert swept[:4] == ["cohesion", "coupling", "centred difference", "centred contrast"]


RATIO = Measure(
    "relative norm",
    per_token("ratio", lambda x, inputs: x.norm(dim=1) / inputs.norm(dim=1)),
    panel="norm",
    sentence="The length of a token over its length at the input",
)


def test_sums_over_images_give_the_mean_over_tokens() -> None:
    """A bootstrap of them is one over whole images."""
    read = tokens()
    assert isinstance(RATIO.source, PerImage)
    sums = {key: x[:, None].numpy() for key, x in RATIO.source.keep(read).items()}
    [estimate] = Bootstrap(5).estimate(sums, RATIO.source.read)
    ratio = read.features.double().norm(dim=1) / read.inputs.double().norm(dim=1)
    assert estimate.value == pytest.approx(float(ratio.mean()), rel=1e-6)
    assert sums["sum"][1, 0] == pytest.approx(float(ratio[4:13].sum()), rel=1e-6)
    means = [ratio[i == IMAGES].mean() for i in range(5)]
    assert min(means) < estimate.low < estimate.value < estimate.high < max(means)


def test_one_entry_is_in_all_four(monkeypatch: pytest.MonkeyPatch) -> None:
    more = (*MEASURES, RATIO)
    for module in (table, findings, plots):
        monkeypatch.setattr(module, "MEASURES", more)
    monkeypatch.setattr("prereg_kernels.demo.experiment.summary.MEASURES", more)
    read = tokens()
    groups = at_layer(read, DEMO)
    expected = float((read.features.norm(dim=1) / read.inputs.norm(dim=1)).mean())
    assert groups["states"]["relative norm"] == expected
    for place in (DEMO, SWEEP):
        assert RATIO in measures_in([groups], place)
        groups["states"].pop("relative norm", None)  # results of before it was there
        assert RATIO not in measures_in([groups], place)
        groups["states"]["relative norm"] = expected

    curve = [Estimate(1.0, 1.0, 1.0), Estimate(1.2, 1.1, 1.3), Estimate(1.5, 1.4, 1.6)]
    change = [Estimate(x.value - 1, x.low - 1, x.high - 1) for x in curve]
    results: Any = SimpleNamespace(
        name="one", layers=3, probes={}, curves={"relative norm": curve},
        changes={"relative norm": change},
    )  # fmt: skip
    [line] = findings.sentences(results)
    assert line == (
        "The length of a token over its length at the input is 1.000 at the input and 1.200 at "
        "layer 1: +0.200 (95% interval +0.100 to +0.300), a rise."
    )
    with theme("light") as colours:
        drawing = plots.measures("tokens", [results], colours)
    assert drawing is not None
    [drawn] = [axis for axis in drawing.panels if axis.get_title(loc="left") == "norm"]
    assert drawn.lines[0].get_ydata().tolist() == [1.0, 1.2, 1.5]
