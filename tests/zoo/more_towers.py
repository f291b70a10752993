# SPDX-License-Identifier: Apache-2.0
"""Further types with one size of images, and towers of their own."""

from __future__ import annotations

import torch

from tests.attach.families.models import IMAGE, LAYERS, NEW, WIDTH, noise
from tests.zoo.many_sizes import padded
from tests.zoo.one_size import one_size
from tests.zoo.parts import (
    TEXT,
    Media,
    audio,
    defaults,
    images,
    make_batches,
    shrunk,
    text_part,
    tiny_config,
    tiny_model,
)
from tests.zoo.sample import Sample, case

# Segment Anything's encoder.
SAM = {
    "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 16,
    "initializer_range": 0.2,
}  # fmt: skip
# Experts in all layers but the first.
SPARSE = {"mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)]}


@case("deepseek_ocr2")
def deepseek_ocr2() -> Sample:
    """144 rows for a tile, 144 for the whole image, and one row between the two views."""
    pixels = {
        "pixel_values": noise(3, 3, 64, 64),
        "pixel_values_local": noise(1, 3, 48, 48),
        "num_local_patches": torch.tensor([0, 1, 0]),
    }
    config = tiny_config(
        "deepseek_ocr2",
        text={**SPARSE, "num_experts_per_tok": 2, "num_key_value_heads": 2, "pad_token_id": 0},
        vision={
            "sam_config": SAM | {"image_size": 64, "downsample_channels": [16, WIDTH]},
            "encoder_config": shrunk(defaults("deepseek_ocr2_encoder"), TEXT, num_hidden_layers=2),
        },
    )
    batches = make_batches(images(145, 289, 145, **pixels))
    return Sample(tiny_model(config), batches)


@case("deepseek_vl_hybrid")
def deepseek_vl_hybrid() -> Sample:
    sam = {"model_type": "sam_vision_model", **SAM}
    config = tiny_config("deepseek_vl_hybrid", high_res_vision_config=sam)
    pixels = {
        "pixel_values": noise(3, 3, 16, 16), "high_res_pixel_values": noise(3, 3, 32, 32),
    }  # fmt: skip
    return Sample(tiny_model(config), make_batches(images(16, 16, 16, **pixels)))


def got(model_type: str) -> Sample:
    """The second image is of two tiles."""
    batches = make_batches(images(4, 8, 4, pixel_values=noise(4, 3, 32, 32)))
    config = tiny_config(model_type, vision=SAM)
    return Sample(tiny_model(config, "GotOcr2ForConditionalGeneration"), batches)


@case("got_ocr2")
def got_ocr2() -> Sample:
    return got("got_ocr2")


@case("pp_chart2table")
def pp_chart2table() -> Sample:
    return got("pp_chart2table")


@case("shieldgemma2")
def shieldgemma2() -> Sample:
    config = tiny_config(
        "shieldgemma2",
        text={
            "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16,
        },
        top={"mm_tokens_per_image": 4},
    )  # fmt: skip
    batches = make_batches(
        images(4, 4, 4, pixel_values=noise(3, 3, 16, 16)),
        types=lambda kinds: {"token_type_ids": kinds},
    )
    return Sample(tiny_model(config, "Gemma3ForConditionalGeneration"), batches)


@case("lighton_ocr")
def lighton_ocr() -> Sample:
    batches = make_batches(images(4, 6, 6, **padded()))
    config = tiny_config("lighton_ocr", vision={"image_size": 32})
    return Sample(tiny_model(config), batches)


@case("qianfan_ocr")
def qianfan_ocr() -> Sample:
    vision = {"image_size": [16, 16], "patch_size": [4, 4], "drop_path_rate": 0.0}
    # The second image is of two tiles.
    batches = make_batches(images(4, 8, 4, pixel_values=noise(4, 3, 16, 16)))
    return Sample(tiny_model(tiny_config("qianfan_ocr", vision=vision)), batches)


@case("janus")
def janus() -> Sample:
    """Its generator of images takes no part in a training step on texts."""
    config = tiny_config(
        "janus",
        vision={"mlp_ratio": 1.0},
        vq_config={
            "embed_dim": 4, "num_embeddings": 8, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": WIDTH,
            "image_token_embed_dim": WIDTH, "num_hidden_layers": 2,
        },
    )  # fmt: skip
    return one_size(config, 16)


@case("step3p7")
def step3p7() -> Sample:
    """Tiles of an image stand before the whole image."""
    attention = ["sliding_attention", "full_attention"]
    config = tiny_config(
        "step3p7",
        text={
            **SPARSE, "share_expert_dim": 16, "layer_types": attention * 2, "sliding_window": 8,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1e4} for kind in attention
            },
        },
        vision={"mlp_ratio": 1.25, "max_position_embeddings": 64},
    )  # fmt: skip
    pixels = {
        "pixel_values": noise(3, 3, 32, 32),
        "pixel_values_local": noise(2, 3, 16, 16),
        "num_local_patches": torch.tensor([0, 2, 0]),
    }
    return Sample(tiny_model(config), make_batches(images(4, 6, 4, **pixels)))


@case("aria")
def aria() -> Sample:
    config = tiny_config(
        "aria",
        text={
            "intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2,
            "moe_num_shared_experts": 1,
        },
        top={"projector_patch_to_query_dict": {16: 4}, "initializer_range": 0.3},
    )  # fmt: skip
    seen = torch.ones(3, 16, 16, dtype=torch.bool)
    seen[1, :, 8:] = False
    batches = make_batches(images(4, 4, 4, pixel_values=noise(3, 3, 16, 16), pixel_mask=seen))
    return Sample(tiny_model(config), batches)


@case("fuyu")
def fuyu() -> Sample:
    """No tower: patches through a matrix. A newline follows each row of them, a plain token."""
    config = tiny_config(
        "fuyu", text=text_part("persimmon"), top={"patch_size": 4, "image_size": 16}
    )
    pictures = Media(
        1, IMAGE, [(2, 2), (3, 3), (2, 2, 2)], {"image_patches": noise(1, 16, 48)}, ((), (NEW,))
    )
    return Sample(tiny_model(config), make_batches(pictures))


@case("inkling_mm_model")
def inkling_mm_model() -> Sample:
    """A norm follows the embedding table; images and audio clips go past it."""
    config = tiny_config(
        "inkling_mm_model",
        text={
            **SPARSE, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2,
            "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 8,
            "layer_types": ["hybrid_sliding", "hybrid"] * 2, "conv_kernel_size": 2,
            "logits_mup_width_multiplier": 1.0, "route_scale": 1.0,
        },
        vision={"n_layers": 2, "patch_size": 2},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    frames = torch.randint(8, (2, 3, 4), generator=generator)
    heard = torch.tensor([[True, True, True], [True, True, False]])
    batches = make_batches(
        images(2, 3, 2, pixel_values=noise(7, 2, 2, 2, 3)),
        audio=audio(3, 2, audio_input_ids=frames, audio_input_ids_mask=heard),
    )
    return Sample(tiny_model(config), batches)
