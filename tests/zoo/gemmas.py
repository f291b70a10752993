# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n and 4: a row of each layer's own for every token, and sounds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tests.attach.families.models import IMAGE, NEW, WIDTH, noise
from tests.zoo.parts import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    TEXT,
    VISION,
    VOCABULARY,
    audio,
    defaults,
    images,
    make_batches,
    mm_types,
    shrunk,
    tiny_config,
    tiny_model,
    videos,
)
from tests.zoo.sample import Batch, Sample, case
from tests.zoo.stubs import StubTower, towers

LAYER_TYPES = ["sliding_attention", "full_attention"] * 2


@case("gemma3n")
def gemma3n() -> Sample:
    """Ids from 40 on, NEW too, have rows in the towers' own tables; AltUp carries three streams."""
    rotary = {name: {"rope_type": "default", "rope_theta": 1e4} for name in set(LAYER_TYPES)}
    text = {
        "intermediate_size": [40] * 4, "layer_types": LAYER_TYPES, "laurel_rank": 4,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": IMAGE,
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 3, "rope_parameters": rotary,
    }  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "vocab_size": AUDIO - IMAGE, "vocab_offset": IMAGE,
        "model_type": "gemma3n_vision",
    }  # fmt: skip
    ears = defaults("gemma3n")["audio_config"] | {
        "vocab_size": VOCABULARY - AUDIO, "vocab_offset": AUDIO, "hidden_size": WIDTH,
        "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "input_feat_size": 16,
        "sscp_conv_channel_size": [4, 4],
    }  # fmt: skip
    top = {
        "vision_soft_tokens_per_image": 4, "audio_soft_tokens_per_image": 5,
        "boa_token_id": AUDIO_START, "eoa_token_id": AUDIO_END,
    }  # fmt: skip
    config = tiny_config(
        "gemma3n", text=text,
        top={**top, "vision_config": vision, "audio_config": ears},
    )  # fmt: skip
    with towers("gemma3n", StubTower):
        model = tiny_model(config)
    sounds = {
        "input_features": noise(1, 32, 16),
        "input_features_mask": torch.ones(1, 32, dtype=torch.bool),
    }
    seen = images(4, 4, 4, pixel_values=noise(3, 3, 16, 16))._replace(around=((7,), (NEW,)))
    batches = make_batches(seen, audio=audio(5, **sounds))
    return Sample(model, batches)


def positions(count: int, side: int) -> Tensor:
    """Column and line of each patch of so many square images."""
    axis = torch.arange(side)
    return torch.cartesian_prod(axis, axis).flip(-1).repeat(count, 1, 1)


def with_frames(model: Any, batches: dict[str, Batch]) -> Sample:
    """As the newest releases take videos: all frames in a row, and how many each has."""
    if "num_frames_per_video" in inspect.signature(model.forward).parameters:
        for batch in batches.values():
            videos = batch.inputs.get("pixel_values_videos")
            if videos is not None:
                batch.inputs["num_frames_per_video"] = torch.full((len(videos),), videos.shape[1])
                for name in ("pixel_values_videos", "video_position_ids"):
                    batch.inputs[name] = batch.inputs[name].flatten(0, 1)
    return Sample(model, batches)


@case("gemma4")
def gemma4() -> Sample:
    text = {
        "layer_types": LAYER_TYPES, "use_bidirectional_attention": "vision",
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    }  # fmt: skip
    vision = shrunk(
        defaults("gemma4_vision"), VISION,
        position_embedding_size=16, pooling_kernel_size=2, default_output_length=4,
    )  # fmt: skip
    ears = shrunk(
        defaults("gemma4_audio"), TEXT,
        num_hidden_layers=1, subsampling_conv_channels=[16, 4], output_proj_dims=WIDTH,
    )  # fmt: skip
    config = tiny_config("gemma4", text=text, top={"vision_config": vision, "audio_config": ears})
    sounds = {
        "input_features": noise(1, 16, 16),
        "input_features_mask": torch.ones(1, 16, dtype=torch.bool),
    }
    batches = make_batches(
        images(4, 4, 4, pixel_values=noise(3, 16, 48), image_position_ids=positions(3, 4)),
        videos(
            (4, 4), (4, 4), pixel_values_videos=noise(2, 2, 16, 48),
            video_position_ids=positions(4, 4).unflatten(0, (2, 2)),
        ),
        audio(4, **sounds), types=mm_types,
    )  # fmt: skip
    return with_frames(tiny_model(config), batches)


@case("gemma4_unified")
def gemma4_unified() -> Sample:
    """Without towers: patches and sounds are projected."""
    vision = shrunk(
        defaults("gemma4_unified_vision"), VISION, mm_embed_dim=WIDTH, mm_posemb_size=16,
        pooling_kernel_size=1, output_proj_dims=WIDTH,
    )  # fmt: skip
    ears = {**defaults("gemma4_unified_audio"), "audio_embed_dim": 16}
    config = tiny_config(
        "gemma4_unified", text={"layer_types": LAYER_TYPES},
        top={"vision_config": vision, "audio_config": ears},
    )  # fmt: skip
    sounds = {
        "input_features": noise(1, 3, 16),
        "input_features_mask": torch.ones(1, 3, dtype=torch.bool),
    }
    batches = make_batches(
        images(4, 4, 4, pixel_values=noise(3, 4, 48), image_position_ids=positions(3, 2)),
        videos(
            (4, 4), (4, 4), pixel_values_videos=noise(2, 2, 4, 48),
            video_position_ids=positions(4, 2).unflatten(0, (2, 2)),
        ),
        audio(3, **sounds), types=mm_types,
    )  # fmt: skip
    return with_frames(tiny_model(config), batches)
