# SPDX-License-Identifier: Apache-2.0
"""Types whose images keep their size: in tiles, in patches, or padded to the largest."""

from __future__ import annotations

from typing import Any

import torch

from tests.attach.families.models import IMAGE, TILES, VIDEO, WIDTH, Inputs, anyres, noise
from tests.zoo.parts import images, make_batches, text_part, tiny_config, tiny_model, videos
from tests.zoo.sample import Sample, case

SIZES = ((16, 16), (16, 24), (24, 16))


def padded() -> Inputs:
    """Pixtral's images, padded to 24 x 24 pixels."""
    pixels = torch.zeros(3, 3, 24, 24)
    for image, (height, width) in zip(pixels, SIZES, strict=True):
        image[:, :height, :width] = noise(3, height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(SIZES)}


def pixtral(config: Any) -> Sample:
    """Squares of 8 x 8 pixels; each line of them ends with a token of the text."""
    media = images(**padded())
    runs = [[width // 8] * (height // 8) for height, width in SIZES]
    batches = make_batches(media._replace(runs=runs, between=(7,)))
    return Sample(tiny_model(config), batches)


def mistral3_config(text: dict[str, Any]) -> Any:
    return tiny_config(
        "mistral3", vision={"image_size": 32}, top={"text_config": text, "spatial_merge_size": 2}
    )


@case("mistral3")
def mistral3() -> Sample:
    return pixtral(mistral3_config(text_part("mistral", sliding_window=None)))


@case("mistral3+mistral4")
def mistral3_mistral4() -> Sample:
    return pixtral(mistral3_config(text_part("mistral4", head_dim=16)))


@case("llava+pixtral")
def llava_pixtral() -> Sample:
    vision = text_part("pixtral", image_size=32, patch_size=8, num_hidden_layers=2)
    top = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return pixtral(tiny_config("llava", top={**top, "vision_config": vision}))


@case("lfm2_vl")
def lfm2_vl() -> Sample:
    text = {
        "block_multiple_of": 8, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2,
    }  # fmt: skip
    shapes = torch.tensor(SIZES) // 4
    pixels = noise(3, 24, 48)
    mask = torch.arange(24) < shapes.prod(dim=1)[:, None]
    inputs = {
        "pixel_values": pixels * mask[..., None], "pixel_attention_mask": mask.long(),
        "spatial_shapes": shapes,
    }  # fmt: skip
    batches = make_batches(images(4, 6, 6, **inputs))
    return Sample(tiny_model(tiny_config("lfm2_vl", text=text)), batches)


@case("minicpmv4_6")
def minicpmv4_6() -> Sample:
    """Patches of 4 x 4 pixels, one image after another; four by four of them are a token."""
    text = {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    }  # fmt: skip
    sizes = {"insert_layer_id": 0, "image_size": 32, "patch_size": 4}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    config = tiny_config("minicpmv4_6", text=text, vision=sizes, top={**sizes, **ids})
    shapes = torch.tensor([(8, 12)] * 3)  # of one size within a batch
    pixels = noise(1, 3, 4, 4 * int(shapes.prod(dim=1).sum()))
    frames = torch.tensor([(8, 8)] * 2)
    media = (
        images(6, 6, 6, pixel_values=pixels, target_sizes=shapes),
        videos(
            (4, 4), target_sizes_videos=frames,
            pixel_values_videos=noise(1, 3, 4, 4 * int(frames.prod(dim=1).sum())),
        ),
    )  # fmt: skip
    return Sample(tiny_model(config), make_batches(*media))


@case("granite4_vision")
def granite4_vision() -> Sample:
    """Features are added behind the embeddings, where rows of zeros wait for them."""
    config = tiny_config(
        "granite4_vision",
        text={"model_type": "granite4_vision_text"},
        vision={"num_hidden_layers": 3, "model_type": "siglip_vision_model"},
        qformer_config={
            "encoder_hidden_size": WIDTH, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        top={
            **TILES, "deepstack_layer_map": [[-1, 0], [-2, 1]], "image_seq_length": 4,
            "spatial_target_layers": [0, 1, 2, 3], "downsample_rate": "1/2",
            "projector_dropout": 0.0, "vision_feature_select_strategy": "full",
        },
    )  # fmt: skip
    config.qformer_config.num_attention_heads = 2  # from 5.24 it is the vision tower's width / 64
    model = tiny_model(config)
    pixels = anyres([[(16, 32), (30, 20)], [(16, 32)]])
    with torch.no_grad():
        features = model.get_image_features(**pixels).deepstack_features[0][1]
    return Sample(model, make_batches(images(*map(len, features), **pixels)))
