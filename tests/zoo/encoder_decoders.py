# SPDX-License-Identifier: Apache-2.0
"""Types with an encoder that reads the images among the words, and a decoder that answers.

BLIP-2 with T5 is another, beside the other Q-Formers.
"""

from __future__ import annotations

import torch

from tests.attach.families.models import IMAGE, LAYERS, NEW, WIDTH, noise, pooled
from tests.zoo.parts import (
    SPECIAL_TOKENS,
    TEXT,
    VISION,
    VOCABULARY,
    defaults,
    images,
    make_batches,
    shrunk,
    tiny_config,
    tiny_model,
)
from tests.zoo.sample import Sample, case


@case("florence2")
def florence2() -> Sample:
    """One image a row."""
    text = {
        "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "vocab_size": VOCABULARY, "dropout": 0.0, "init_std": 0.2,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2, "max_position_embeddings": 512,
        **SPECIAL_TOKENS,
    }  # fmt: skip
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 2],
        "num_groups": [2, 2], "window_size": 4, "drop_path_rate": 0.0, "projection_dim": WIDTH,
        "max_position_embeddings": 20, "max_temporal_embeddings": 5,
    }  # fmt: skip
    model = tiny_model(tiny_config("florence2", text=text, vision=vision))
    pixels = noise(2, 3, 32, 32)
    with torch.no_grad():
        features = torch.stack(pooled(model.get_image_features(pixels)))
        tokens = features.flatten(0, -2).shape[0] // 2
    batches = make_batches(images(tokens, tokens, pixel_values=pixels), decoder_labels=True)
    return Sample(model, batches)


@case("t5gemma2")
def t5gemma2() -> Sample:
    parts = defaults("t5gemma2")
    more = {
        "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    encoder = {
        "text_config": shrunk(parts["encoder"]["text_config"], TEXT, **more),
        "vision_config": shrunk(parts["encoder"]["vision_config"], VISION),
        "mm_tokens_per_image": 4, "boi_token_index": NEW, "eoi_token_index": NEW,
        "image_token_index": IMAGE,
    }  # fmt: skip
    decoder = shrunk(parts["decoder"], TEXT, **more)
    config = tiny_config("t5gemma2", top={"encoder": encoder, "decoder": decoder})
    media = images(4, 4, 4, pixel_values=noise(3, 3, 16, 16))
    return Sample(tiny_model(config), make_batches(media, decoder_labels=True))
