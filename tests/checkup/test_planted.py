# SPDX-License-Identifier: Apache-2.0
"""Planted changes: each is found by the measures that should see it, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from prereg_kernels.checkup import (
    logit_lens,
    patch_structure,
    pool,
    probe,
    similarity,
    spectrum,
    token_norms,
)
from prereg_kernels.checkup.measures.measure import Tokens
from prereg_kernels.checkup.measures.table import MEASURES

SCENES, OBJECTS, PATCHES, D, CLASSES = 160, 4, 4, 24, 4

IMAGES = torch.arange(SCENES).repeat_interleave((OBJECTS + 1) * PATCHES)
OWNERS = (torch.arange(OBJECTS + 1).repeat_interleave(PATCHES) - 1).repeat(SCENES)
THINGS = torch.where(OWNERS >= 0, IMAGES * OBJECTS + OWNERS, -1)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def classes(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(seed))


OBJECT_CLASS = classes(SCENES, OBJECTS, seed=0)
IMAGE_CLASS = classes(SCENES, seed=1)
ROTATION = torch.linalg.qr(random(D, D, seed=2)).Q
VOCABULARY = random(200, D, seed=3)


@cache
def intact() -> Tensor:
    """Scenes with a class, of objects with classes, of patches: (N, D)."""
    centres = random(CLASSES, D, seed=4)[OBJECT_CLASS] + 0.6 * random(SCENES, OBJECTS, D, seed=5)
    centres = torch.cat([random(SCENES, 1, D, seed=6), centres], dim=1)  # the background's first
    scenes = 0.3 * random(CLASSES, D, seed=7)[IMAGE_CLASS]
    return scenes[IMAGES] + centres[IMAGES, OWNERS + 1] + 0.8 * random(len(IMAGES), D, seed=8)


def mixed(x: Tensor) -> Tensor:
    """Towards the mean patch of the image."""
    return 0.2 * x + 0.8 * pool(x, IMAGES)[0][IMAGES]


def blurred(x: Tensor) -> Tensor:
    """The objects of an image share their mean; patches differ from it as they did."""
    scene = pool(x, IMAGES.where(OWNERS >= 0, -1))[0][IMAGES]
    own = pool(x, THINGS)[0][THINGS.clamp_min(0)]
    return torch.where((OWNERS >= 0)[:, None], x + 0.9 * (scene - own), x)


def collapsed(x: Tensor) -> Tensor:
    """Onto two directions."""
    return x @ ROTATION[:, :2] @ ROTATION[:, :2].T


def shifted(x: Tensor) -> Tensor:
    """By a large component that all patches share."""
    return x + 30 * ROTATION[0]


def silenced(x: Tensor) -> Tensor:
    """Two patches in three say the same word, whatever they show, as loudly as before."""
    word = VOCABULARY[7] / VOCABULARY[7].norm()
    return torch.where((torch.arange(len(x)) % 3 == 0)[:, None], x, x.norm(dim=1)[:, None] * word)


def massive(x: Tensor) -> Tensor:
    """One patch in a hundred has a massive activation, as constant as these are."""
    x = x.clone()
    x[::100, 5] = 5000.0
    return x


def from_table(name: str, y: Tensor, x: Tensor) -> float:
    """An entry of `MEASURES` on the tokens y, which were x at the input."""
    measure = next(measure for measure in MEASURES if measure.name == name)
    return float(measure.value(measure.source.of(Tokens(y, x, IMAGES, SCENES, OWNERS))))


@cache
def measures(change: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
    x = intact()
    y = x if change is None else change(x)
    structure, similar, norms = patch_structure(y, OWNERS, IMAGES), similarity(y, x), token_norms(y)
    words = logit_lens(y, nn.RMSNorm(D, dtype=torch.float64), VOCABULARY)
    spread = spectrum(y)
    objects, ids = pool(y, THINGS)
    return {  # each on a scale of about 0 to 1
        "cohesion": structure.cohesion,
        "coupling": structure.coupling,
        "difference": structure.difference,
        "centred difference": structure.centred_difference,
        "effective dimension": spread.effective_dimension / D,
        "correlation": 1.5 * spread.mean_correlation,
        "CKA": similar.cka,
        "debiased CKA": similar.debiased_cka,
        "cosine": from_table("cosine to input", y, x),
        "centred cosine": similar.centred_cosine,
        "relative norm": similar.relative_norm,
        "outliers": 10 * norms.outliers,
        "massive": 10 * norms.massive,
        "silenced": words.silenced,
        "entropy": words.entropy / 4,
        "object probe": probe(objects, OBJECT_CLASS.flatten(), groups=ids // OBJECTS).mean,
        "image probe": probe(pool(y, IMAGES)[0], IMAGE_CLASS).mean,
    }


# + rises, - falls, 0 stays. Massive activations move the mean patch, and so all that is centred.
TABLE = """
                       mixed  blurred  collapsed  shifted  silenced  massive
cohesion               +      -        -          +        -         0
coupling               +      +        0          +        +         0
difference             -      -        -          -        -         0
centred difference     -      -        -          0        -         -
effective dimension    -      +        -          0        -         -
correlation            +      -        +          0        +         0
CKA                    -      -        -          0        -         -
debiased CKA           -      -        -          0        -         -
cosine                 -      -        -          -        -         0
centred cosine         -      -        -          0        -         -
relative norm          -      -        -          +        0         +
outliers               0      0        0          0        0         +
massive                0      0        0          0        0         +
silenced               +      +        +          +        +         0
entropy                -      -        -          -        -         0
object probe           -      -        -          0        0         0
image probe            0      0        -          0        -         0
"""
CHANGES = {f.__name__: f for f in (mixed, blurred, collapsed, shifted, silenced, massive)}
CELLS = [
    (measure, name, sign)
    for measure, *signs in (x.rsplit(maxsplit=len(CHANGES)) for x in TABLE.strip().splitlines()[1:])
    for name, sign in zip(CHANGES, signs, strict=True)
]
MOVED, STAYED = 0.04, 0.02


@pytest.mark.parametrize(
    "measure, change, expected", CELLS, ids=[f"{m}-{change}" for m, change, _ in CELLS]
)
def test_planted_change(measure: str, change: str, expected: str) -> None:
    moved = measures(CHANGES[change])[measure] - measures(None)[measure]
    if expected == "0":
        assert abs(moved) <= STAYED
    else:
        assert moved * (1 if expected == "+" else -1) >= MOVED


def test_the_table_has_every_measure() -> None:
    assert {measure for measure, _, _ in CELLS} == set(measures(None))


LENGTHS = {"relative norm"}  # change with the scale of the tokens


@pytest.mark.parametrize("measure", sorted({m for m, _, _ in CELLS} - LENGTHS))
def test_scale_changes_lengths_alone(measure: str) -> None:
    assert scaled()[measure] == pytest.approx(measures(None)[measure], abs=1e-9)
    assert scaled()["relative norm"] == pytest.approx(3)


@cache
def scaled() -> dict[str, float]:
    return measures(lambda x: 3 * x)


# change with the basis: dimensions correlate otherwise, and the vocabulary is elsewhere
DIRECTIONS = {"correlation", "cosine", "centred cosine", "silenced", "entropy"}


@pytest.mark.parametrize("measure", sorted({m for m, _, _ in CELLS} - DIRECTIONS))
def test_rotation_changes_no_measure_of_shape(measure: str) -> None:
    tolerance = 0.02 if "probe" in measure else 1e-9  # which standardises each dimension
    assert rotated()[measure] == pytest.approx(measures(None)[measure], abs=tolerance)
    assert abs(rotated()["cosine"]) < 0.4


@cache
def rotated() -> dict[str, float]:
    return measures(lambda x: x @ ROTATION)
