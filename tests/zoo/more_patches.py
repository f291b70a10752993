# SPDX-License-Identifier: Apache-2.0
"""Further types whose images are patches in a row, with a grid each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from tests.attach.families.models import Inputs, Size
from tests.zoo.parts import (
    Media,
    Types,
    images,
    make_batches,
    mm_types,
    mrope,
    no_types,
    tiny_config,
    tiny_model,
    videos,
)
from tests.zoo.qwen_like import (
    IMAGES,
    INTERLEAVED,
    WHOLE,
    glm,
    square_patches,
    stamped,
    three_images,
    two_videos,
)
from tests.zoo.sample import Sample, case

FRAMES = ((2, 16, 24), (2, 16, 16))  # frames, height, width


def flat_patches(sizes: Sequence[Size]) -> tuple[Tensor, Tensor]:
    """Patches of one frame by 4 x 4 pixels, (patches, 48), and each input's grid of them."""
    pixels, grids = square_patches(sizes)
    return pixels.flatten(1), grids


def frame_images() -> Media:
    pixels, grids = flat_patches(IMAGES)
    return images(4, 6, 6, pixel_values=pixels, image_grid_thw=grids)


def frame_videos(*runs: Sequence[int]) -> Media:
    pixels, grids = flat_patches(FRAMES)
    return videos(*runs, pixel_values_videos=pixels, video_grid_thw=grids)


def whole(config: Any, types: Types = no_types) -> Sample:
    """Each video is one run of tokens."""
    return Sample(tiny_model(config), make_batches(three_images(), two_videos(WHOLE), types=types))


@case("exaone4_5")
def exaone4_5() -> Sample:
    vision = {"fullatt_block_indexes": [1], "window_size": 16}
    return whole(tiny_config("exaone4_5", vision=vision))


@case("cosmos3_omni")
def cosmos3_omni() -> Sample:
    vision = {"deepstack_visual_indexes": [0, 1]}
    return stamped(tiny_config("cosmos3_omni", text=INTERLEAVED, vision=vision))


@case("cosmos3_edge")
def cosmos3_edge() -> Sample:
    config = tiny_config("cosmos3_edge", text={"rope_parameters": mrope(4, 2, 2)})
    batches = make_batches(frame_images(), frame_videos((6, 6), (4, 4)), types=mm_types)
    return Sample(tiny_model(config), batches)


@case("cohere_compass")
def cohere_compass() -> Sample:
    attention = ["sliding_attention", "full_attention"]
    config = tiny_config(
        "cohere_compass",
        text={
            "layer_types": attention * 2,
            "rope_parameters": {
                kind: mrope(4, 2, 2, mrope_interleaved=True) for kind in attention
            },
        },
        vision={"deepstack_visual_indexes": [0, 1]},
    )  # fmt: skip
    return stamped(config)


def experts_of_vision(kinds: Tensor) -> Inputs:
    """Those see the tokens before and after an image or a video too."""
    near = max_pool1d((kinds > 0).float()[:, None], 3, stride=1, padding=1)[:, 0]
    return {"mm_token_type_ids": kinds, "moe_mm_token_type_ids": near.int()}


@case("ernie4_5_vl_moe")
def ernie4_5_vl_moe() -> Sample:
    """Two frames of a video become one."""
    text = {
        "moe_intermediate_size": [16, 8], "moe_num_experts": 4, "moe_k": 2,
        "rope_parameters": mrope(3, 3, 2),
    }  # fmt: skip
    config = tiny_config("ernie4_5_vl_moe", text=text)
    batches = make_batches(frame_images(), frame_videos((6,), (4,)), types=experts_of_vision)
    return Sample(tiny_model(config), batches)


@case("glmga")
def glmga() -> Sample:
    return glm("glmga")


@case("minimax_m3_vl")
def minimax_m3_vl() -> Sample:
    text = {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "intermediate_size": 16, "dense_intermediate_size": 40, "shared_intermediate_size": 16,
        "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4,
        "index_topk_blocks": 2,
    }  # fmt: skip
    return whole(tiny_config("minimax_m3_vl", text=text))


@case("muse_glimmer")
def muse_glimmer() -> Sample:
    config = tiny_config(
        "muse_glimmer",
        vision={"pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
        top={"out_hidden_size": 128},
    )
    return whole(config)


@case("hunyuan_vl")
def hunyuan_vl() -> Sample:
    """The tower adds learned rows, at the image's id too: begin, a newline after each row, end."""
    config = tiny_config(
        "hunyuan_vl",
        text={"head_dim": 16, "rope_parameters": mrope(2, 2, 2, 2)},
        vision={"temporal_patch_size": 1, "max_image_size": 32},
    )
    pixels, grids = flat_patches(((1, 24, 32), (1, 32, 32), (1, 32, 24)))
    batches = make_batches(
        images(17, 22, 18, pixel_values=pixels, image_grid_thw=grids), types=mm_types
    )
    return Sample(tiny_model(config), batches)


@case("video_llama_3")
def video_llama_3() -> Sample:
    """A video's tokens that repeat those of the frame before may be left out."""
    seen, watched = frame_images(), frame_videos((6, 4), (4, 3))
    kept = torch.ones(20, dtype=torch.bool)
    kept[[6, 9, 17]] = False
    seen.inputs["image_merge_sizes"] = torch.tensor([2, 2, 2])
    watched.inputs["video_merge_sizes"] = torch.tensor([2, 2])
    watched.inputs["video_compression_mask"] = kept
    return Sample(tiny_model(tiny_config("video_llama_3")), make_batches(seen, watched))
