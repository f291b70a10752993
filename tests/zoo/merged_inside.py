# SPDX-License-Identifier: Apache-2.0
"""Types that put the features in place within the language model's own forward."""

from __future__ import annotations

import torch
import transformers as hf

from tests.attach.families.models import IMAGE, LAYERS, WIDTH, Inputs, noise
from tests.zoo.parts import (
    AUDIO,
    SPECIAL_TOKENS,
    TEXT,
    VISION,
    VOCABULARY,
    audio,
    defaults,
    images,
    make_batches,
    shrunk,
    tiny_config,
    tiny_model,
)
from tests.zoo.sample import Sample, case


@case("chameleon")
def chameleon() -> Sample:
    """Images become 64 tokens of the vocabulary; their id stands in its map alone."""
    codes = {f"IMGIMG{letter}Z": 51 + code for code, letter in enumerate("ABCDEFGH")}
    sizes_of_codes = {
        "embed_dim": 4, "num_embeddings": 8, "latent_channels": 4, "resolution": 16,
        "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1,
    }  # fmt: skip
    sizes = {name: TEXT[name] for name in TEXT if not name.endswith("token_id")}
    config = tiny_config(
        "chameleon", vq_config=sizes_of_codes,
        top={**sizes, "vocabulary_map": {**codes, "<image>": IMAGE}},
    )  # fmt: skip
    model, pixels = tiny_model(config), noise(3, 3, 16, 16)
    quantiser = model.model.vqmodel
    with torch.no_grad():
        latents = quantiser.quant_conv(quantiser.encoder(pixels))
        # Any other codes are far from all latents: every image would be the same.
        quantiser.quantize.embedding.weight.copy_(latents[0].flatten(1).T[::8])
    return Sample(model, make_batches(images(64, 64, 64, pixel_values=pixels)))


@case("phi4_multimodal")
def phi4_multimodal() -> Sample:
    """A tile and a small copy of each image; the id stands in the config of the tower."""
    parts = defaults("phi4_multimodal")
    if parts["vision_config"] is None:  # releases before 5 leave them out
        parts["vision_config"] = hf.Phi4MultimodalVisionConfig().to_dict()
        parts["audio_config"] = hf.Phi4MultimodalAudioConfig().to_dict()
    vision = shrunk(
        parts.pop("vision_config"), VISION, crop_size=16, image_token_id=IMAGE, feature_layer=-2
    )
    ears = parts.pop("audio_config")
    del ears["nemo_final_size"]
    ears |= {
        "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
        "input_size": 16, "nemo_conv_channels": 8, "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16, "bias_max_distance": 8, "audio_token_id": AUDIO,
    }  # fmt: skip
    sizes = {**TEXT, "sliding_window": None}
    del sizes["head_dim"]
    more = {"original_max_position_embeddings": 512, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = tiny_config(
        "phi4_multimodal",
        top={**shrunk(parts, sizes, **more), "vision_config": vision, "audio_config": ears},
    )  # fmt: skip
    pixels = {
        "image_pixel_values": noise(2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2),
        "image_attention_mask": torch.ones(2, 2, 4, 4, dtype=torch.bool),
    }  # fmt: skip
    sounds = {"audio_input_features": noise(1, 16, 16), "audio_embed_sizes": torch.tensor([2])}
    batches = make_batches(images(13, 13, **pixels), audio=audio(2, **sounds))
    return Sample(tiny_model(config, "Phi4MultimodalForCausalLM"), batches)


@case("kosmos-2")
def kosmos_2() -> Sample:
    """One image a row, never none; a mask says where, and no id."""
    text = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 128, "embed_dim": WIDTH,
        "layers": LAYERS, "ffn_dim": 40, "attention_heads": 2, "dropout": 0.0, "init_std": 0.2,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0, **SPECIAL_TOKENS,
    }  # fmt: skip
    vision = {"patch_size": 8}
    config = tiny_config("kosmos-2", text=text, vision=vision, top={"latent_query_num": 4})

    def positions(kinds: torch.Tensor) -> Inputs:
        return {"image_embeds_position_mask": kinds}

    media = images(4, 4, pixel_values=noise(2, 3, 16, 16))
    return Sample(tiny_model(config), make_batches(media, types=positions, text_only=False))
