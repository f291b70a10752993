# SPDX-License-Identifier: Apache-2.0
"""Cohesion and coupling against all pairs written out, and against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.checkup import StructureSums, patch_structure
from prereg_kernels.checkup.measures.structure import PatchStructure


def brute_force(features: Tensor, objects: Tensor, images: Tensor) -> tuple[float, float]:
    same, different = [], []
    for i in range(len(features)):
        for j in range(len(features)):
            if i == j or images[i] != images[j] or objects[i] < 0 or objects[j] < 0:
                continue
            similarity = float(F.cosine_similarity(features[i], features[j], dim=0))
            (same if objects[i] == objects[j] else different).append(similarity)
    return sum(same) / len(same), sum(different) / len(different)


@pytest.mark.parametrize("seed", range(3))
def test_equals_all_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(40, 7, generator=generator, dtype=torch.float64) + 0.5
    objects = torch.randint(-1, 3, (40,), generator=generator)
    images = torch.randint(0, 3, (40,), generator=generator)
    got = patch_structure(features, objects, images)
    cohesion, coupling = brute_force(features, objects, images)
    assert got.cohesion == pytest.approx(cohesion, rel=1e-12)
    assert got.coupling == pytest.approx(coupling, rel=1e-12)
    assert got.contrast == pytest.approx(cohesion / coupling, rel=1e-12)
    assert got.difference == pytest.approx(cohesion - coupling, rel=1e-12)

    # the mean patch counts the background too
    cohesion, coupling = brute_force(features - features.mean(dim=0), objects, images)
    assert got.centred_cohesion == pytest.approx(cohesion, rel=1e-12)
    assert got.centred_coupling == pytest.approx(coupling, rel=1e-12)
    assert got.centred_contrast == pytest.approx(cohesion / coupling, rel=1e-12)
    assert got.centred_difference == pytest.approx(cohesion - coupling, rel=1e-12)


def test_by_hand() -> None:
    # object 0: two equal directions; object 1: at 60 degrees to them; background is left out
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 9.0]])
    got = patch_structure(x, torch.tensor([0, 0, 1, -1]))
    assert got.cohesion == pytest.approx(1.0)
    assert got.coupling == pytest.approx(0.5)


def test_centred_by_hand() -> None:
    # about the mean (10, 0), object 0 is (1, 0) twice and object 1 (-1, 1), (-1, -1)
    x = torch.tensor([[11.0, 0.0], [11.0, 0.0], [9.0, 1.0], [9.0, -1.0]])
    got = patch_structure(x, torch.tensor([0, 0, 1, 1]))
    assert got.centred_cohesion == pytest.approx((1 + 0) / 2, abs=1e-7)
    assert got.centred_coupling == pytest.approx(-math.sqrt(0.5), rel=1e-6)


def test_a_mean_from_elsewhere() -> None:
    x = torch.tensor([[2.0, 1.0], [2.0, 3.0]])
    objects = torch.tensor([0, 0])
    got = StructureSums(torch.tensor([2.0, 0.0])).update(x, objects).result()
    assert got.cohesion == pytest.approx(7 / math.sqrt(5 * 13))
    assert got.centred_cohesion == pytest.approx(1.0)
    without = StructureSums().update(x, objects).result()
    assert without.cohesion == got.cohesion
    assert math.isnan(without.centred_cohesion) and math.isnan(without.centred_difference)


@pytest.mark.parametrize("value", [0.1, 1000.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_that_equal_their_mean_have_no_direction(value: float, dtype: torch.dtype) -> None:
    x = torch.full((30, 5), value, dtype=dtype)
    got = patch_structure(x, torch.arange(30) // 10)
    assert got[:2] == pytest.approx((1.0, 1.0))
    assert got[2:] == (0.0, 0.0)


def test_rows_of_zeros_have_no_direction() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert patch_structure(x, torch.tensor([0, 0, 0])).cohesion == pytest.approx(1 / 3)


def test_pairs_stay_within_an_image() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    got = patch_structure(x, torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 1]))
    assert got.cohesion == pytest.approx(1.0)
    assert math.isnan(got.coupling)


@pytest.mark.parametrize("objects", [[-1, -1, -1], [-1, 2, -1]])
def test_no_pairs(objects: list[int]) -> None:
    got = patch_structure(torch.eye(3), torch.tensor(objects))
    assert all(math.isnan(value) for value in got)
    assert math.isnan(got.contrast) and math.isnan(got.difference)


def test_contrast_of_orthogonal_objects() -> None:
    assert math.isnan(PatchStructure(1.0, 0.0).contrast)
    assert math.isnan(PatchStructure(1.0, 0.5, 1.0, 0.0).centred_contrast)


def test_bad_input() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"objects: expected shape \(3,\), got \(2,\)"):
        patch_structure(x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"images: expected shape \(3,\), got \(2,\)"):
        patch_structure(x, torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"objects: expected integers, got torch.float32"):
        patch_structure(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"features: expected shape \(N, 3\), got \(3, 2\)"):
        StructureSums(torch.zeros(3)).update(x, torch.zeros(3, dtype=torch.long))
