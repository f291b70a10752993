# SPDX-License-Identifier: Apache-2.0
"""Other language models and towers in types that take any: 'model_type+variant'."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.attach.families.models import (
    IMAGE,
    LAYERS,
    TILES,
    WIDTH,
    anyres,
    noise,
    pooled,
    tower,
)
from tests.zoo.one_size import one_size
from tests.zoo.parts import images, make_batches, text_part, tiny_config, tiny_model
from tests.zoo.q_formers import OPT, Q_FORMER, TOWER, questions
from tests.zoo.sample import Sample, case


def llava(text: dict[str, Any]) -> Sample:
    config = hf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower(projection_dim=16)},
        text_config=text, image_token_id=IMAGE, image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    return one_size(config, 4)


UNTIED = {"tie_word_embeddings": False}
# As in GPT-2's config.
OLD_NAMES = {
    "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "resid_pdrop": 0.0, **UNTIED,
}  # fmt: skip


@case("llava+gpt2")
def llava_with_gpt2() -> Sample:
    """Learned positions are added within; the layers are called `h`."""
    return llava(text_part("gpt2", n_positions=256, **OLD_NAMES))


@case("llava+gptj")
def llava_with_gptj() -> Sample:
    """A layer returns its hidden states in a tuple, with its attention weights."""
    return llava(text_part("gptj", rotary_dim=8, **OLD_NAMES))


@case("llava+falcon")
def llava_with_falcon() -> Sample:
    """A layer returns its hidden states in a tuple, with nothing."""
    return llava(text_part("falcon", ffn_hidden_size=40, **UNTIED))


@case("llava+mpt")
def llava_with_mpt() -> Sample:
    """The layers are called `blocks`."""
    sizes = {"d_model": WIDTH, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 256}
    return llava(text_part("mpt", **sizes, **UNTIED))


@case("llava+opt")
def llava_with_opt() -> Sample:
    """The language model has a decoder in it; positions are added within."""
    return llava(text_part("opt", initializer_range=0.2, **OPT, **UNTIED))


@case("llava+gemma")
def llava_with_gemma() -> Sample:
    """It scales the rows of its table."""
    return llava(text_part("gemma"))


@case("llava+granite")
def llava_with_granite() -> Sample:
    """The merged embeddings and the residuals are scaled within."""
    multipliers = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
    return llava(text_part("granite", **multipliers))


@case("llava+mixtral")
def llava_with_mixtral() -> Sample:
    return llava(text_part("mixtral"))


@case("llava+qwen3_next")
def llava_with_qwen3_next() -> Sample:
    """Linear attention and full attention in turn, and experts."""
    kinds = ["linear_attention", "full_attention"] * 2
    return llava(text_part("qwen3_next", layer_types=kinds))


@case("llava+siglip")
def llava_with_siglip() -> Sample:
    config = hf.LlavaConfig(
        vision_config={
            "model_type": "siglip_vision_model", "vision_use_head": False, **tower(),
        },
        text_config=text_part("qwen2"), image_token_id=IMAGE, image_seq_length=4,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return one_size(config, 4)


@case("llava_next+mistral")
def llava_next_with_mistral() -> Sample:
    config = tiny_config(
        "llava_next", vision=tower(), top={**TILES, "text_config": text_part("mistral")}
    )
    model = tiny_model(config)
    pixels = anyres([[(16, 32), (30, 20)], [(16, 32)]])
    features = pooled(model.get_image_features(**pixels))
    return Sample(model, make_batches(images(*map(len, features), **pixels)))


@case("instructblip+llama")
def instructblip_with_llama() -> Sample:
    """As Vicuna's."""
    config = tiny_config(
        "instructblip", vision=TOWER, qformer_config=Q_FORMER,
        top={
            "num_query_tokens": 3, "image_token_index": IMAGE, "text_config": text_part("llama"),
        },
    )  # fmt: skip
    media = images(3, 3, 3, pixel_values=noise(3, 3, 16, 16), **questions(3))
    return Sample(tiny_model(config), make_batches(media, text_only=False))
