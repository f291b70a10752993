# SPDX-License-Identifier: Apache-2.0
"""Types whose images are patches in a row, with a grid each, as Qwen2-VL's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.attach.families.models import IMAGE, NEW, WIDTH, Size, noise, qwen_patches
from tests.zoo.parts import (
    AUDIO_END,
    AUDIO_START,
    VIDEO_END,
    VIDEO_START,
    Media,
    audio,
    images,
    make_batches,
    mm_types,
    mrope,
    tiny_config,
    tiny_model,
    videos,
)
from tests.zoo.sample import Sample, case

IMAGES = ((1, 16, 16), (1, 16, 24), (1, 24, 16))  # frames, height, width
VIDEOS = ((4, 16, 24), (2, 16, 16))
# A video is a run of tokens for each two frames, with a time stamp between, or one for them all.
STAMPED = ((6, 6), (4,))
WHOLE = ((12,), (4,))

INTERLEAVED = {"rope_parameters": mrope(4, 2, 2, mrope_interleaved=True)}
HYBRID = {
    "rope_parameters": mrope(2, 3, 3, mrope_interleaved=True, partial_rotary_factor=1.0),
    "layer_types": ["linear_attention", "full_attention"] * 2,
}


def three_images() -> Media:
    pixels, grids = qwen_patches(IMAGES)
    return images(4, 6, 6, pixel_values=pixels, image_grid_thw=grids)


def two_videos(runs: Sequence[Sequence[int]]) -> Media:
    pixels, grids = qwen_patches(VIDEOS)
    return videos(*runs, pixel_values_videos=pixels, video_grid_thw=grids)


def stamped(config: Any) -> Sample:
    return Sample(
        tiny_model(config), make_batches(three_images(), two_videos(STAMPED), types=mm_types)
    )


@case("qwen3_vl_moe")
def qwen3_vl_moe() -> Sample:
    vision = {"deepstack_visual_indexes": [0, 1]}
    return stamped(tiny_config("qwen3_vl_moe", text=INTERLEAVED, vision=vision))


@case("qwen3_5")
def qwen3_5() -> Sample:
    return stamped(tiny_config("qwen3_5", text=HYBRID))


@case("qwen3_5_moe")
def qwen3_5_moe() -> Sample:
    return stamped(tiny_config("qwen3_5_moe", text=HYBRID))


@case("qwen4_exp")
def qwen4_exp() -> Sample:
    text = {
        "rope_parameters": mrope(2, 3, 3, mrope_interleaved=True),
        "layer_types": ["linear_attention", "qwen_sparse_attention"] * 2,
        "hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 1, "heads_per_ngram": 2,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    }  # fmt: skip
    return stamped(tiny_config("qwen4_exp", text=text))


OMNI_TOKENS = {
    "vision_start_token_id": NEW, "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
}  # fmt: skip
OMNI_EARS = {
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
    "num_mel_bins": 16, "max_source_positions": 16, "output_dim": WIDTH,
}  # fmt: skip


def omni(config: Any, sounds: Media) -> Sample:
    seen = two_videos(WHOLE)
    seen.inputs["video_second_per_grid"] = torch.ones(2)
    return Sample(tiny_model(config), make_batches(three_images(), seen, sounds))


@case("qwen2_5_omni_thinker")
def qwen2_5_omni_thinker() -> Sample:
    config = tiny_config(
        "qwen2_5_omni_thinker", text={"rope_parameters": mrope(2, 3, 3)},
        vision={"fullatt_block_indexes": [1], "window_size": 16}, top=OMNI_TOKENS,
        audio_config={**OMNI_EARS, "n_window": 4},
    )  # fmt: skip
    return omni(config, mel(3))


@case("qwen3_omni_moe_thinker")
def qwen3_omni_moe_thinker() -> Sample:
    config = tiny_config(
        "qwen3_omni_moe_thinker", text=INTERLEAVED, vision={"deepstack_visual_indexes": [0, 1]},
        top=OMNI_TOKENS,
        audio_config={**OMNI_EARS, "downsample_hidden_size": 8},
    )  # fmt: skip
    return omni(config, mel(2))


def mel(tokens: int) -> Media:
    """A clip of 12 frames in 16 bands."""
    mask = torch.ones(1, 12, dtype=torch.long)
    return audio(tokens, input_features=noise(1, 16, 12), feature_attention_mask=mask)


def two_glm_videos() -> Media:
    """Their frames are at the positions of the image token, as images are."""
    seen = two_videos(STAMPED)
    around = ((VIDEO_START, NEW), (NEW, VIDEO_END))
    return seen._replace(token=IMAGE, around=around, between=(NEW, 7, NEW))


GLM_TOKENS = {"video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END}


def glm(model_type: str) -> Sample:
    """A model that refuses a batch of images and videos: it counts them at the same positions."""
    text = {"rope_parameters": mrope(2, 1, 1, partial_rotary_factor=0.5)}
    config = tiny_config(model_type, text=text, top=GLM_TOKENS)
    batches = make_batches(three_images(), two_glm_videos(), types=mm_types, together=False)
    return Sample(tiny_model(config), batches)


@case("glm4v")
def glm4v() -> Sample:
    return glm("glm4v")


@case("glm4v_moe")
def glm4v_moe() -> Sample:
    return glm("glm4v_moe")


@case("glm_ocr")
def glm_ocr() -> Sample:
    return glm("glm_ocr")


@case("glm46v")
def glm46v() -> Sample:
    return glm("glm46v")


@case("glm5_next")
def glm5_next() -> Sample:
    text = {
        "hc_mult": 2, "head_dim": 16, "qk_rope_head_dim": 0, "linear_head_dim": 8,
        "linear_num_heads": 2, "linear_conv_kernel_dim": 2, "index_topk": 8, "index_head_dim": 8,
        "index_n_heads": 2, "index_kpool": 2,
        "layer_types": ["linear_attention", "deepseek_sparse_attention"] * 2,
    }  # fmt: skip
    config = tiny_config(
        "glm5_next", text=text, vision={"projection_intermediate_size": 16}, top=GLM_TOKENS
    )
    batches = make_batches(three_images(), two_glm_videos(), types=mm_types)
    return Sample(tiny_model(config), batches)


def square_patches(sizes: Sequence[Size]) -> tuple[Tensor, Tensor]:
    """Patches of one frame by 4 x 4 pixels, (patches, 3, 4, 4), and each input's grid of them."""
    grids = torch.tensor([(t, h // 4, w // 4) for t, h, w in sizes])
    return noise(int(grids.prod(dim=1).sum()), 3, 4, 4), grids


@case("paddleocr_vl")
def paddleocr_vl() -> Sample:
    """The config has a video id; the model sees images alone."""
    config = tiny_config("paddleocr_vl", text={"rope_parameters": mrope(2, 3, 3)})
    pixels, grids = square_patches(IMAGES)
    batches = make_batches(
        images(4, 6, 6, pixel_values=pixels, image_grid_thw=grids), types=mm_types
    )
    return Sample(tiny_model(config), batches)


@case("kimi_k25")
def kimi_k25() -> Sample:
    """Videos are chunks of one frame: of more, transformers counts other tokens than it makes."""
    config = tiny_config(
        "kimi_k25", text={"head_dim": 8}, vision={"pos_emb_height": 8, "pos_emb_width": 8}
    )
    pixels, grids = square_patches(IMAGES)
    frames, frame_grids = square_patches(((1, 16, 24), (1, 16, 16)))
    batches = make_batches(
        images(4, 6, 6, pixel_values=pixels, image_grid_thw=grids),
        videos((6,), (4,), pixel_values_videos=frames, video_grid_thw=frame_grids),
    )
    return Sample(tiny_model(config), batches)
