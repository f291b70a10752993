# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the types that PRe cannot serve: `REFUSED["blip"]()`.

The comment at each says why: no visual token enters a language model that is trained on text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from torch import nn

from tests.attach.families.models import IMAGE, LAYERS, WIDTH, tower
from tests.releases import is_here
from tests.zoo.more_towers import SAM
from tests.zoo.parts import (
    SPECIAL_TOKENS,
    TEXT,
    VISION,
    VOCABULARY,
    defaults,
    shrunk,
    text_part,
    tiny_config,
    tiny_model,
)
from tests.zoo.qwen_like import qwen2_5_omni_thinker, qwen3_omni_moe_thinker

REFUSED: dict[str, Callable[[], nn.Module]] = {}
NAMES: set[str] = set()  # those too that this release of transformers lacks


def refused(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(build: Callable[[], Any]) -> Callable[[], Any]:
        NAMES.add(name)
        if is_here(name):
            REFUSED[name] = build
        return build

    return add


# Sizes of T5 and its kin.
T5 = {
    "d_model": WIDTH, "d_kv": 16, "d_ff": 40, "num_layers": LAYERS, "num_heads": 2,
    "vocab_size": VOCABULARY, "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip


@refused("blip")
def blip() -> nn.Module:
    # The decoder reads the patches by cross-attention.
    config = tiny_config("blip", text={"encoder_hidden_size": WIDTH})
    return tiny_model(config, "BlipForConditionalGeneration")


@refused("pix2struct")
def pix2struct() -> nn.Module:
    # An encoder of patches; the decoder reads them by cross-attention.
    text = {name: T5[name] for name in ("d_kv", "d_ff", "num_layers", "num_heads", "dropout_rate")}
    vision = {"d_kv": 16, "d_ff": 40, "patch_embed_hidden_size": 48, "seq_len": 16}
    config = tiny_config("pix2struct", text=text, vision=vision)
    return tiny_model(config, "Pix2StructForConditionalGeneration")


@refused("pp_formulanet")
def pp_formulanet() -> nn.Module:
    # An encoder of patches; the decoder reads them by cross-attention.
    config = tiny_config(
        "pp_formulanet",
        text={
            "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": LAYERS, "decoder_ffn_dim": 40,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0,
            **SPECIAL_TOKENS,
        },
        vision={
            **SAM, "post_conv_in_channels": 8, "post_conv_mid_channels": 16,
            "post_conv_out_channels": 16, "decoder_hidden_size": WIDTH,
        },
    )  # fmt: skip
    return tiny_model(config, "PPFormulaNetForConditionalGeneration")


@refused("vision-encoder-decoder")
def vision_encoder_decoder() -> nn.Module:
    # An encoder of patches; the decoder reads them by cross-attention.
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**tower()),
        hf.TrOCRConfig(
            d_model=WIDTH, decoder_layers=LAYERS, decoder_attention_heads=2, decoder_ffn_dim=40,
            vocab_size=VOCABULARY, dropout=0.0, cross_attention_hidden_size=16, **SPECIAL_TOKENS,
        ),
    )  # fmt: skip
    return tiny_model(config, "VisionEncoderDecoderModel")


@refused("udop")
def udop() -> nn.Module:
    # An encoder of words, to which it adds the patches they lie on; no ids for the other patches.
    config = hf.UdopConfig(
        **T5, image_size=16, patch_size=4, num_decoder_layers=LAYERS, pad_token_id=0, eos_token_id=2
    )
    return tiny_model(config, "UdopForConditionalGeneration")


@refused("evolla")
def evolla() -> nn.Module:
    # Proteins, not images; the decoder reads them by cross-attention.
    config = tiny_config(
        "evolla",
        top=text_part(
            "evolla", aligner_num_add_layers=2, aligner_ffn_mult=1, resampler_depth=1,
            resampler_dim_head=16, resampler_heads=2, resampler_num_latents=4,
            protein_encoder_config=shrunk(
                defaults("evolla")["protein_encoder_config"], TEXT, mask_token_id=4,
            ),
        ),
    )  # fmt: skip
    return tiny_model(config, "EvollaForProteinText2Text")


@refused("mistral4")
def mistral4() -> nn.Module:
    # Text alone.
    return tiny_model(tiny_config("mistral4", top=text_part("mistral4", head_dim=16)))


@refused("diffusion_gemma")
def diffusion_gemma() -> nn.Module:
    # Its forward has no loss: it refines a canvas, from the keys and values of a prompt.
    kinds = ["sliding_attention", "full_attention"] * 2
    vision = shrunk(
        defaults("gemma4_vision"), VISION, position_embedding_size=16, pooling_kernel_size=2,
        default_output_length=4,
    )  # fmt: skip
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    config = tiny_config(
        "diffusion_gemma", text={"layer_types": kinds, **experts}, top={"vision_config": vision}
    )
    return tiny_model(config, "DiffusionGemmaForBlockDiffusion")


@refused("pi0")
def pi0() -> nn.Module:
    # Its loss is about a robot's actions: no text is predicted from the visual tokens.
    text = text_part("gemma")
    seeing = {
        "model_type": "paligemma", "text_config": text, "projection_dim": WIDTH,
        "image_token_index": IMAGE, "hidden_size": WIDTH,
        "vision_config": {
            "model_type": "siglip_vision_model", "vision_use_head": False, **tower(),
        },
    }  # fmt: skip
    config = hf.PI0Config(
        vlm_config=seeing, dit_config=text, chunk_size=3, max_state_dim=4, max_action_dim=4
    )
    return tiny_model(config, "PI0ForConditionalGeneration")


@refused("qwen2_5_omni")
def qwen2_5_omni() -> nn.Module:
    # A shell without a forward: its part `thinker` is the model that trains.
    thinker = qwen2_5_omni_thinker().model.config.to_dict()
    config = hf.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    return tiny_model(config, "Qwen2_5OmniForConditionalGeneration")


@refused("qwen3_omni_moe")
def qwen3_omni_moe() -> nn.Module:
    # A shell without a forward: its part `thinker` is the model that trains.
    thinker = qwen3_omni_moe_thinker().model.config.to_dict()
    config = hf.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    return tiny_model(config, "Qwen3OmniMoeForConditionalGeneration")
