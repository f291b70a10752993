# SPDX-License-Identifier: Apache-2.0
"""`prereg train` under DeepSpeed: what one process does, from its checkpoints too after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.packages.run import ROOT, folder_of
from tests.train.engines import SETTINGS, Place

pytestmark = pytest.mark.packages
FILE = str(ROOT / "examples" / "deepspeed_zero{}.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def run(place: Place, tuned: str, out: Path, **options: Any) -> str:
    variables = {"PYTHONPATH": str(folder_of("deepspeed")), "DS_ACCELERATOR": "cpu"}
    return place.run(tuned, out, variables=variables, **options)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("tuned", SETTINGS)
def test_two_ranks_are_one(place: Place, tmp_path: Path, tuned: str, stage: int) -> None:
    """Killed after a checkpoint, and started again; the second step is of text alone."""
    out = tmp_path / "out"
    run(
        place, tuned, out, faults=["1 kill step-2"], restarts=1,
        trainer__deepspeed=FILE.format(stage), trainer__gradient_checkpointing=True,
    )  # fmt: skip
    assert (tmp_path / "markers/1 kill step-2").exists()
    assert list((out / "stages/tune/checkpoint-2").glob("global_step2/zero_pp_rank_1*"))
    place.check(tuned, out)


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_s_file(place: Place, tmp_path: Path, stage: int) -> None:
    """examples/accelerate/zero2.yaml, zero3.yaml."""
    run(place, "full", tmp_path / "out", launcher=f"zero{stage}")
    place.check("full", tmp_path / "out")


def test_another_number_of_ranks_is_refused(place: Place, tmp_path: Path) -> None:
    out, file = tmp_path / "out", FILE.format(2)
    faults = ["1 kill step-2"]
    run(place, "full", out, faults=faults, is_expected_to_fail=True, trainer__deepspeed=file)
    said = run(place, "full", out, ranks=1, is_expected_to_fail=True, trainer__deepspeed=file)
    assert "DeepSpeed reads its checkpoints on as many ranks as wrote them" in said
    assert "expected 2, got 1" in said
