# SPDX-License-Identifier: Apache-2.0
"""The shipped structures are those of the shipped configs."""

from __future__ import annotations

import json

import pytest

from benchmarks.step.structures import model_of, walked
from prereg_kernels.estimate import shipped
from prereg_kernels.estimate.settings import Settings
from prereg_kernels.estimate.structure import Structure
from prereg_kernels.train.parts import parts_of

# Of the configs that ship, as transformers builds them; checkpoints were not at hand to compare
PARAMETERS = {
    "llava-1.5-7b": 7_063_427_072,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3-vl-235b-a22b": 235_670_022_896,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    """Those of the model on the meta device, part by part, and as they have been."""
    model = model_of(shipped.config_of(name))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes.values()) == PARAMETERS[name]
    for trains in shipped.TRAINS:
        structure = shipped.structure_of(name, trains)
        for part, names in parts_of(model).items():
            assert structure.parameters([part]) == sum(sizes[n] for n in names), part


def test_names() -> None:
    assert set(shipped.names()) == set(PARAMETERS)


def fresh(name: str) -> None:
    [structure] = walked(name, [("projector", "llm")])
    assert structure == shipped.structure_of(name, ("projector", "llm"))


def test_a_fresh_walk() -> None:
    fresh("llava-1.5-7b")


@pytest.mark.matrix
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_fresh_walk(name: str) -> None:
    for structure in walked(name):
        assert structure == shipped.structure_of(name, structure.trains)


@pytest.mark.parametrize("name", PARAMETERS)
def test_json(name: str) -> None:
    structure = shipped.structure_of(name, ("projector", "llm"))
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))) == structure


@pytest.mark.parametrize(
    ("name", "settings", "decoder", "attention"),
    [
        ("llava-1.5-7b", Settings(), 477.5e12, 2 * 7.4e12),
        ("llava-1.5-7b", Settings(checkpointing=True), 601.2e12, 2 * 9.9e12),
        ("qwen2.5-vl-7b", Settings(images_per_step=8, tokens=128), 400.9e12, 2 * 7.9e12),
        (
            "qwen2.5-vl-7b", Settings(images_per_step=8, tokens=128, checkpointing=True),
            495.6e12, 2 * 10.5e12,
        ),
    ],
)  # fmt: skip
def test_the_decoder_s_layers(
    name: str, settings: Settings, decoder: float, attention: float
) -> None:
    """As docs/gpu.md counts them from the config, with half of the square for attention."""
    structure = shipped.structure_of(name, ("projector", "llm"))
    total = 0.0
    for block, counts in structure.of_sample(settings.tokens, structure.visual_tokens):
        if block.layer:
            again = counts.again if settings.checkpointing else 0.0
            total += settings.samples * (counts.forward + counts.backward + again)
    assert abs(total / (decoder + attention) - 1) < 1e-3
