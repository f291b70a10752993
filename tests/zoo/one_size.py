# SPDX-License-Identifier: Apache-2.0
"""Types that resize every image, or every tile of it, to the size of the tower."""

from __future__ import annotations

from typing import Any

import torch

from tests.attach.families.models import IMAGE, WIDTH, images_by_row, noise
from tests.zoo.parts import VOCABULARY, images, make_batches, tiny_config, tiny_model
from tests.zoo.sample import Sample, case
from tests.zoo.stubs import StubTower, towers


def one_size(config: Any, tokens: int) -> Sample:
    pixels = noise(3, 3, 16, 16)
    batches = make_batches(images(tokens, tokens, tokens, pixel_values=pixels))
    return Sample(tiny_model(config), batches)


def tiled(config: Any, tokens: int) -> Sample:
    """Images of one, two and one tiles of so many tokens; the tiles follow one another."""
    media = images(pixel_values=noise(4, 3, 16, 16))
    media = media._replace(runs=((tokens,), (tokens, tokens), (tokens,)), between=(7,))
    return Sample(tiny_model(config), make_batches(media))


@case("vipllava")
def vipllava() -> Sample:
    config = tiny_config(
        "vipllava", vision={"num_hidden_layers": 3},
        top={"vision_feature_layers": [-1, -2], "image_seq_length": 16},
    )  # fmt: skip
    return one_size(config, 16)


@case("aya_vision")
def aya_vision() -> Sample:
    return tiled(tiny_config("aya_vision"), 4)


@case("cohere2_vision")
def cohere2_vision() -> Sample:
    return tiled(tiny_config("cohere2_vision", top={"alignment_intermediate_size": 64}), 4)


@case("deepseek_vl")
def deepseek_vl() -> Sample:
    return one_size(tiny_config("deepseek_vl"), 16)


@case("llama4")
def llama4() -> Sample:
    text = {
        "intermediate_size_mlp": 40, "attention_chunk_size": 64, "interleave_moe_layer_step": 2,
    }  # fmt: skip
    vision = {
        "vision_output_dim": WIDTH, "projector_input_dim": WIDTH, "projector_output_dim": WIDTH,
        "intermediate_size": 128, "rope_parameters": None,
    }  # fmt: skip
    return tiled(tiny_config("llama4", text=text, vision=vision), 4)


@case("ovis2")
def ovis2() -> Sample:
    """Beside an image stand indicators, whose rows the model exchanges for learned ones."""
    vision = {"vocab_size": 32, "num_visual_indicator_tokens": 5, "hidden_stride": 2}
    indicators = [51, 52, 53, 54, 55]
    config = tiny_config("ovis2", vision=vision, top={"visual_indicator_token_ids": indicators})
    media = images(4, 4, 4, pixel_values=noise(3, 3, 16, 16))
    batches = make_batches(media._replace(around=(indicators[:1], indicators[1:2])))
    return Sample(tiny_model(config), batches)


@case("idefics2")
def idefics2() -> Sample:
    resampler = {
        "hidden_size": WIDTH, "resampler_n_latents": 3, "resampler_depth": 1,
        "resampler_n_heads": 2, "resampler_head_dim": 16, "num_key_value_heads": 1,
    }  # fmt: skip
    pixels = images_by_row([[(16, 16), (12, 16)], [(16, 8)]])
    model = tiny_model(tiny_config("idefics2", perceiver_config=resampler))
    # They begin as ones: all three would be the same.
    latents = model.model.connector.perceiver_resampler.latents
    torch.nn.init.normal_(latents, generator=torch.Generator().manual_seed(0))
    return Sample(model, make_batches(images(3, 3, 3, **pixels)))


@case("emu3")
def emu3() -> Sample:
    """Images become tokens of the vocabulary, eight lines of eight and one that ends the line."""
    codes = {f"<|visual token {code:06d}|>": 50 + code for code in range(8)}
    vocabulary = {**codes, "<image>": IMAGE, "<|extra_200|>": VOCABULARY - 1}
    quantiser = {
        "codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
        "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [],
        "hidden_size": 32, "temporal_downsample_factor": 1,
    }  # fmt: skip
    config = tiny_config("emu3", top={"vocabulary_map": vocabulary}, vq_config=quantiser)
    pixels = {"pixel_values": noise(3, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 3)}
    return Sample(tiny_model(config), make_batches(images(72, 72, 72, **pixels)))


@case("fast_vlm")
def fast_vlm() -> Sample:
    vision = {"architecture": "fastvit_mci3"}
    with towers("fast_vlm", StubTower):
        model = tiny_model(tiny_config("fast_vlm", vision=vision, top={"image_seq_length": 4}))
    return Sample(model, make_batches(images(4, 4, 4, pixel_values=noise(3, 3, 16, 16))))
