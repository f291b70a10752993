# SPDX-License-Identifier: Apache-2.0
"""`prereg train` under FSDP2: what one process does, after kills and on other numbers of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.engines import SETTINGS, Place

pytestmark = pytest.mark.ranks
SHARDED = {
    "trainer__fsdp": "full_shard",
    "trainer__fsdp_config": {
        "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("tuned", SETTINGS)
def test_two_ranks_are_one(place: Place, tmp_path: Path, tuned: str) -> None:
    """Killed after a checkpoint, and started again; the second step is of text alone."""
    out = tmp_path / "out"
    place.run(
        tuned, out, faults=["1 kill step-2"], restarts=1, trainer__gradient_checkpointing=True,
        **SHARDED,
    )  # fmt: skip
    assert (tmp_path / "markers/1 kill step-2").exists()
    assert list((out / "stages/tune/checkpoint-2").glob("pytorch_model_fsdp_0/*.distcp"))
    place.check(tuned, out)


def test_accelerate_s_file(place: Place, tmp_path: Path) -> None:
    """examples/accelerate/fsdp2.yaml: ranks after the first load nothing."""
    place.run("full", tmp_path / "out", launcher="fsdp2")
    place.check("full", tmp_path / "out")


@pytest.mark.parametrize("ranks", [2, 1])
def test_another_number_goes_on(place: Place, tmp_path: Path, ranks: int) -> None:
    """By torch's distributed checkpoints."""
    out = tmp_path / "out"
    fault = f"{ranks - 1} kill step-2"
    place.run("full", out, ranks=ranks, faults=[fault], is_expected_to_fail=True, **SHARDED)
    assert (out / "stages/tune/checkpoint-2").is_dir() and not (out / "model.safetensors").exists()
    place.run("full", out, ranks=3 - ranks, **SHARDED)
    place.check("full", out)


def test_where_accelerate_would_leave_it_out(place: Place, tmp_path: Path) -> None:
    """An error, in place of a run without it."""
    said = place.run(
        "full",
        tmp_path / "out",
        is_expected_to_fail=True,
        variables={"AS_IT_IS": "1"},
        trainer__use_cpu=True,
        **SHARDED,
    )
    assert "prereg: trainer.fsdp: Accelerate takes it up on accelerators alone" in said
