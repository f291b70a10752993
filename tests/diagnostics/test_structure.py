"""Cohesion and coupling against all pairs written out, and against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.diagnostics import patch_structure


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


def test_by_hand() -> None:
    # object 0: two equal directions; object 1: at 60 degrees to them; background is left out
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 9.0]])
    got = patch_structure(x, torch.tensor([0, 0, 1, -1]))
    assert got.cohesion == pytest.approx(1.0)
    assert got.coupling == pytest.approx(0.5)


def test_pairs_stay_within_an_image() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    got = patch_structure(x, torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 1]))
    assert got.cohesion == pytest.approx(1.0)
    assert math.isnan(got.coupling)


def test_bad_input() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"objects: expected shape \(3,\), got \(2,\)"):
        patch_structure(x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="features: expected finite"):
        patch_structure(x * float("nan"), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"features: expected shape \(N, D\)"):
        patch_structure(x[0], torch.zeros(3, dtype=torch.long))
