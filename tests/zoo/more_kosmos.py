# SPDX-License-Identifier: Apache-2.0
"""Kosmos-2.5: the language model itself puts the features in place, where a mask says."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.attach.families.models import LAYERS, WIDTH, Inputs, noise
from tests.zoo.parts import (
    SPECIAL_TOKENS,
    VOCABULARY,
    images,
    make_batches,
    tiny_config,
    tiny_model,
)
from tests.zoo.sample import Sample, case


def image_positions(kinds: Tensor) -> Inputs:
    return {"image_embeds_position_mask": kinds}


@case("kosmos-2.5")
def kosmos_2_5() -> Sample:
    """There is no id in the config. Scale, positions and segments come after the features."""
    config = tiny_config(
        "kosmos-2.5",
        text={
            "embed_dim": WIDTH, "layers": LAYERS, "ffn_dim": 40, "attention_heads": 2,
            "vocab_size": VOCABULARY, "dropout": 0.0, "init_std": 0.2, **SPECIAL_TOKENS,
        },
        vision={"patch_embed_hidden_size": 48, "max_num_patches": 32, "num_hidden_layers": 2},
        top={"latent_query_num": 4, "initializer_range": 0.2},
    )  # fmt: skip
    # A patch begins with its row and column; these are far from the ends of their tables.
    places = torch.cartesian_prod(*[torch.arange(14.0, 18.0)] * 2).expand(3, 16, 2)
    patches = torch.cat([places, noise(3, 16, 48)], dim=2)
    batches = make_batches(images(4, 4, 4, flattened_patches=patches), types=image_positions)
    return Sample(tiny_model(config, "Kosmos2_5ForConditionalGeneration"), batches)
