# SPDX-License-Identifier: Apache-2.0
"""Types that take videos as stacks of images."""

from __future__ import annotations

import torch

from tests.attach.families.models import TILES, anyres, noise, pooled
from tests.zoo.parts import images, make_batches, tiny_config, tiny_model, videos
from tests.zoo.sample import Sample, case
from tests.zoo.stubs import StubTower, towers


@case("llava_next_video")
def llava_next_video() -> Sample:
    config = tiny_config(
        "llava_next_video",
        vision={"patch_size": 8, "model_type": "clip_vision_model", "num_hidden_layers": 3},
        top={
            **TILES, "spatial_pool_stride": 2, "spatial_pool_mode": "average",
            "image_seq_length": 4, "video_seq_length": 1,
        },
    )  # fmt: skip
    model = tiny_model(config)
    pixels = anyres([[(16, 32), (30, 20)], [(16, 32)]])
    with torch.no_grad():
        features = pooled(model.get_image_features(**pixels))
    batches = make_batches(
        images(*map(len, features), **pixels),
        videos((2,), (2,), pixel_values_videos=noise(2, 2, 3, 16, 16)),
    )
    return Sample(model, batches)


@case("video_llava")
def video_llava() -> Sample:
    """Eight frames a video; each, and no image, keeps the row of its class token."""
    config = tiny_config(
        "video_llava", vision={"patch_size": 8, "num_hidden_layers": 3},
        top={"image_seq_length": 4, "video_seq_length": 10},
    )  # fmt: skip
    batches = make_batches(
        images(4, 4, 4, pixel_values_images=noise(3, 3, 16, 16)),
        videos((40,), (40,), pixel_values_videos=noise(2, 8, 3, 16, 16)),
    )
    return Sample(tiny_model(config), batches)


@case("perception_lm")
def perception_lm() -> Sample:
    """Images of one tile each."""
    vision = {"architecture": "vit_pe_core_large_patch14_336", "model_args": {"embed_dim": 32}}
    with towers("perception_lm", lambda: StubTower("tokens behind a class token")):
        model = tiny_model(tiny_config("perception_lm", vision=vision))
    batches = make_batches(
        images(4, 4, 4, pixel_values=noise(3, 1, 3, 16, 16)),
        videos((12,), (12,), pixel_values_videos=noise(2, 3, 3, 16, 16)),
    )
    return Sample(model, batches)
