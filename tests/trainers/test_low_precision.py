# SPDX-License-Identifier: Apache-2.0
"""A bfloat16 model with float32 heads on two ranks: the gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import apply_pre
from tests.helpers import relative_error
from tests.tiny import tiny_llava
from tests.trainers import low_precision_ranks, ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("low precision")
    ranks.run(path, low_precision_ranks.work)
    return path


def read(out: Path, case: str) -> list[Any]:
    return [torch.load(out / f"{case} {rank}.pt") for rank in range(ranks.RANKS)]


def check(out: Path, case: str, expected: dict[str, Tensor], tolerance: float) -> None:
    for ours in read(out, case):
        assert ours.keys() == expected.keys()
        for name, x in expected.items():
            assert ours[name].dtype == x.dtype
            assert relative_error(ours[name], x) < tolerance, name
            assert x.norm() > 1e-3


@pytest.mark.parametrize("wrapper", ("ddp", "fsdp"))
@pytest.mark.parametrize("name", low_precision_ranks.SETTINGS)
def test_gradients(out: Path, wrapper: str, name: str) -> None:
    """Summed over the ranks in float32, in which they were computed: nothing is rounded."""
    expected = low_precision_ranks.alone(**low_precision_ranks.SETTINGS[name])
    assert {x.dtype for x in expected.values()} == {torch.float32}
    check(out, wrapper + name, expected, 1e-6)


@pytest.mark.parametrize("case", ("no layers", "checkpointing", "LoRA"))
def test_gradients_under_fully_shard(out: Path, case: str) -> None:
    expected = low_precision_ranks.alone()
    if case == "LoRA":  # its matrices add zero, at first
        expected = {name: x for name, x in expected.items() if "pre_heads" in name}
    check(out, f"fsdp, {case}", expected, 1e-6)


def test_gradients_in_bfloat16(out: Path) -> None:
    """By the policy, or as the heads are; summed in float32 or bfloat16."""
    check(out, "fsdp, mixed", low_precision_ranks.alone(), 0.01)
    check(out, "fsdp, bfloat16", low_precision_ranks.alone(head_dtype=torch.bfloat16), 0.01)


def test_heads_in_a_unit_of_another_dtype(out: Path) -> None:
    """torch would say "FSDP expects uniform original parameter dtype", and not what to do."""
    for found in read(out, "fsdp, refusals"):
        assert len(found) == 3 and len(set(found)) == 1
        assert "pre.heads" in found[0] and "uniform" not in found[0]
        assert "got heads in float32 among parameters in bfloat16" in found[0]
        assert "call fully_shard(head, ...) with the same options for each head" in found[0]


@pytest.mark.parametrize("case", ("a list", "checkpoint"))
def test_gradients_of_other_units(out: Path, case: str) -> None:
    """One of several heads, or of a head's wrapper, which is then what has to be called."""
    check(out, f"fsdp, {case}", low_precision_ranks.alone(layers=(1, 3)), 1e-6)


@pytest.mark.parametrize("case", ("fsdp1", "fsdp1, flat"))
def test_gradients_under_fsdp1(out: Path, case: str) -> None:
    """Of heads in units of their own, whose wrapper is what has to be called."""
    check(out, case, low_precision_ranks.alone(), 1e-5)


@pytest.mark.parametrize("case", ("fsdp1, float32", "fsdp1, float32, root"))
def test_gradients_of_a_float32_model_under_fsdp1(out: Path, case: str) -> None:
    check(out, case, low_precision_ranks.alone(torch.float32), 1e-5)


def test_gradients_under_fsdp1_in_mixed_precision(out: Path) -> None:
    check(out, "fsdp1, mixed", low_precision_ranks.alone(torch.float32), 0.02)


def test_heads_that_are_sharded_on_the_meta_device(out: Path) -> None:
    """Are drawn as if the model had never been there; every rank keeps its part of the whole."""
    expected = list(apply_pre(tiny_llava(), seed=4).heads[2].parameters())
    for results in read(out, "meta"):
        for found in results:
            assert all(map(torch.equal, found, expected))
