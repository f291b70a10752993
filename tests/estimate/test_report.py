# SPDX-License-Identifier: Apache-2.0
"""What `prereg estimate` prints of a tiny model, whose figures have other units."""

from __future__ import annotations

import copy
import re

import pytest

from prereg_kernels.estimate import report, shipped
from prereg_kernels.estimate.cpu import calibration
from prereg_kernels.estimate.estimate import estimate
from prereg_kernels.estimate.settings import Settings
from prereg_kernels.estimate.walk import walk
from prereg_kernels.train.parts import parts_of
from tests.zoo import sample


@pytest.mark.parametrize(
    "flops, text",
    ((2.345e12, "2.345 TFLOP"), (1.5e15, "1,500 TFLOP"), (2e10, "20 GFLOP"), (2e5, "0.2 MFLOP")),
)
def test_units(flops: float, text: str) -> None:
    assert report._flops(flops) == text


def test_a_tiny_model_on_a_cpu() -> None:
    case = sample("llava")
    trains, twin = ("projector", "llm"), copy.deepcopy(case.model).to("meta")
    batch = case.batches["images"].inputs
    structure = walk(twin, [batch], "llava", parts_of(case.model), trains, None)
    found = estimate(structure, Settings(gpu="cpu", weights="float32"))
    lines = report.describe(found).splitlines()
    assert f"{structure.parameters():,} parameters" in lines[2]
    [heading] = [number for number, line in enumerate(lines) if "without PRe" in line]
    table = lines[heading + 1 : lines.index("", heading)]
    unit = r" +-?[\d.,e-]+ (s|ms|MiB|MFLOP|GFLOP)"
    assert len(table) == 3 + len(found.flops)
    assert all(re.fullmatch(rf"[\w ]+?{unit}({unit}({unit}| +the same))?", x) for x in table)
    assert not re.search(r"\bGPU\b|process -", "\n".join(lines))
    assert f"thread of the {calibration().machine} that was measured" in lines[-2]
    assert f"products of {'float32' if structure.itemsize == 4 else 'bfloat16'}" in lines[-2]


def test_cells_that_are_too_wide_stay_apart() -> None:
    cells = ("n" * 30, "1" * 20, "2" * 20, "3" * 20)
    assert report._row(*cells).split() == list(cells)


@pytest.mark.parametrize(
    ("name", "gpus", "is_said"), [("qwen3-vl-235b-a22b", 512, True), ("llava-1.5-7b", 8, False)]
)
def test_a_wait_for_the_network_is_said(name: str, gpus: int, is_said: bool) -> None:
    """Its parts add up to the step."""
    settings = Settings(gpus=gpus, parallel="fsdp", images_per_step=16 * gpus)
    found = estimate(shipped.structure_of(name, ("projector", "llm")), settings)
    said = re.findall(
        r"computes for ([\d.]+) s and waits .* for ([\d.]+) s", report.describe(found)
    )
    assert bool(said) == is_said
    for computes, waits in said:
        assert float(computes) == pytest.approx(sum(found.parts.values()), rel=0.01)
        assert float(computes) + float(waits) == pytest.approx(found.seconds["none"], rel=0.01)
