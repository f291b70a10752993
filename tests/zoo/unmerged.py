# SPDX-License-Identifier: Apache-2.0
"""Types in which no feature takes the place of a token: `visual` is nowhere."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.attach.families.models import Inputs, noise
from tests.zoo.parts import TEXT, images, make_batches, tiny_config, tiny_model
from tests.zoo.sample import Sample, case


@case("mllama")
def mllama() -> Sample:
    """Some layers attend to the image; a token in the text marks where it is seen from."""
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 16, "vision_output_dim": 32, "image_size": 16, "patch_size": 8,
        "max_num_tiles": 1, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    text = {
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = tiny_config("mllama", text=text, vision=vision)
    pixels = {
        "pixel_values": noise(2, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
    }

    def seen(kinds: Tensor) -> Inputs:
        mask = torch.ones(*kinds.shape, 1, 1, dtype=torch.long)
        return {"cross_attention_mask": mask} if kinds.any() else {}

    return Sample(
        tiny_model(config), make_batches(images(1, 1, **pixels), types=seen, merged=False)
    )


@case("idefics")
def idefics() -> Sample:
    """Layers between the others attend to the image, behind a gate; batches without are refused."""
    vision = {
        "embed_dim": 16, "image_size": 16, "intermediate_size": 16, "patch_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    top = {
        **TEXT, "alpha_initializer": "ones", "freeze_text_layers": False,
        "freeze_vision_layers": False, "vision_config": vision,
    }  # fmt: skip

    def seen(kinds: Tensor) -> Inputs:
        return {"image_attention_mask": torch.ones(*kinds.shape, 1, dtype=torch.long)}

    media = images(1, 1, pixel_values=noise(2, 1, 3, 16, 16))
    batches = make_batches(media, types=seen, text_only=False, merged=False)
    return Sample(tiny_model(tiny_config("idefics", top=top)), batches)


@case("git")
def git() -> Sample:
    """The rows of an image are put before those of the text; the loss presumes them."""
    config = tiny_config(
        "git", vision={"patch_size": 8},
        top={**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )  # fmt: skip
    media = images(1, 1, pixel_values=noise(2, 3, 16, 16))
    batches = make_batches(media, text_only=False, merged=False)
    return Sample(tiny_model(config, "GitForCausalLM"), batches)
