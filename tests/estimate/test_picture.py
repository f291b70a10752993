# SPDX-License-Identifier: Apache-2.0
"""The picture of a step's memory says what the text says, and its names do not collide."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from prereg_kernels.estimate import picture, shipped
from prereg_kernels.estimate.estimate import Estimate, estimate
from prereg_kernels.estimate.memory import Moment, peak
from prereg_kernels.estimate.settings import Settings
from prereg_kernels.estimate.walk import walk
from prereg_kernels.train.parts import parts_of
from tests.zoo import sample

TRAINS = ("projector", "llm")


def of_a_cpu() -> Estimate:
    case = sample("llava")
    batch = case.batches["images"].inputs
    twin = copy.deepcopy(case.model).to("meta")
    structure = walk(twin, [batch], "llava", parts_of(case.model), TRAINS, None)
    return estimate(structure, Settings(gpu="cpu", weights="float32", images_per_step=512))


def of_gpus() -> Estimate:
    structure = shipped.structure_of("qwen2.5-vl-72b", TRAINS)
    return estimate(structure, Settings(gpus=64, parallel="fsdp", checkpointing=True))


@pytest.mark.parametrize("made", (of_a_cpu, of_gpus))
def test_areas_and_line_are_of_the_same_bytes(made: object) -> None:
    """With what a CPU's process is found to take beyond the count, in both."""
    found = made()  # type: ignore[operator]
    moments = found.moments["fused"]
    for moment in moments:
        shown = picture._kinds(moment)
        assert shown.keys() == picture.COLOURS.keys()
        if moment.bytes["scratch"] > -moment.bytes.get("correction", 0.0):
            assert sum(shown.values()) == pytest.approx(moment.total)
    eager = list(picture._eager(moments, found.moments["eager"]))
    assert [math.isnan(total) for total in eager] == [m.place == "PRe" for m in moments]
    own = max(total for total in eager if not math.isnan(total))
    assert own == pytest.approx(peak(found.moments["eager"]).total)
    assert own >= peak(moments).total


@pytest.mark.parametrize("made, unit", ((of_a_cpu, "MiB"), (of_gpus, "GiB")))
def test_words(made: object, unit: str, tmp_path: Path) -> None:
    found = made()  # type: ignore[operator]
    picture.draw(found, tmp_path / "memory.svg")
    drawn = (tmp_path / "memory.svg").read_text()
    words = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    top = peak(found.moments["fused"]).total / (2**20 if unit == "MiB" else 2**30)
    assert f"peak {top:.{1 if unit == 'MiB' else 2}f} {unit}" in words
    assert any(word.startswith(f"PRe, layer {found.head.layer}: ") for word in words)
    assert f"{unit} of {found.settings.holder}" in words


def test_names_stay_apart() -> None:
    """The first layer's, beside the loss in a model of one layer, is left out."""
    places = [("tower", "forward", 0)] * 8 + [("a", "forward", 1), ("loss", "loss", 0)]
    places += [("a", "backward", 1), *[("tower", "backward", 0)] * 8]
    moments = [Moment(*place, {}) for place in places]
    for far, expected in ((0, ["loss"]), (9, ["layer 1", "layer 1", "loss"])):
        between = [Moment("b", "forward", 2, {})] * far
        several = [*moments[:9], *between, moments[9], *between, *moments[10:]]
        axes = Figure().add_subplot()
        picture._name_places(axes, several, np.arange(len(several) + 1.0))
        assert sorted(label.get_text() for label in axes.get_xticklabels()) == expected
