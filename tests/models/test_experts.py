# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts whose experts are quantised and frozen, as QLoRA has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import Tensor

from tests.attached import both, compare
from tests.models.places import place_of
from tests.releases import HERE
from tests.zoo import sample

MIXTURES = ["qwen3_vl_moe", "internvl+gpt_oss"]
if HERE >= (5, 0):  # before, each of its experts is a layer of its own, as in any other model
    MIXTURES.append("llava+mixtral")


def quantised(name: str) -> Any:
    """The model with its experts' matrices in four bits."""
    model = sample(name).model
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            for weight, value in list(module.named_parameters(recurse=False)):
                if value.ndim == 3:
                    replace_parameter_4bit(module, weight, quant_type="nf4")
    experts = [p for n, p in model.named_parameters() if ".experts." in n and p.ndim > 1]
    assert any(p.dtype == torch.uint8 for p in experts)
    return model


@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("name", MIXTURES)
def test_gradients(name: str, checkpointing: bool) -> None:
    batches = sample(name).batches
    batch = batches.get("mixed", batches["images"])
    ours, expected, metrics, (_, term) = both(
        batch.inputs, make=lambda: quantised(name), mask=batch.visual, place=place_of(name),
        checkpointing=checkpointing,
    )  # fmt: skip
    compare(trained(ours), trained(expected))
    assert metrics["visual_tokens"] == batch.visual.sum()
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4)


def trained(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without those of packed integers, which have none."""
    return {name: x for name, x in gradients.items() if x.is_floating_point()}
