# SPDX-License-Identifier: Apache-2.0
"""Listed families with another language model than the usual one."""

from __future__ import annotations

from typing import Any

from tests.attach.families.models import WIDTH, noise, prefix_and_suffix
from tests.zoo.parts import images, make_batches, text_part, tiny_config, tiny_model
from tests.zoo.sample import Sample, case


def internvl(text: dict[str, Any]) -> Sample:
    config = tiny_config(
        "internvl", vision={"image_size": [16, 16], "patch_size": [4, 4]},
        top={"text_config": text, "image_seq_length": 4},
    )  # fmt: skip
    batches = make_batches(images(4, 4, 4, pixel_values=noise(3, 3, 16, 16)))
    return Sample(tiny_model(config), batches)


@case("internvl+qwen3_moe")
def internvl_qwen3_moe() -> Sample:
    return internvl(text_part("qwen3_moe"))


@case("internvl+gpt_oss")
def internvl_gpt_oss() -> Sample:
    return internvl(text_part("gpt_oss"))


@case("paligemma+gemma2")
def paligemma_gemma2() -> Sample:
    """PaliGemma 2."""
    layer_types = ["sliding_attention", "full_attention"] * 2
    text = text_part("gemma2", query_pre_attn_scalar=16, layer_types=layer_types)
    config = tiny_config(
        "paligemma", vision={"patch_size": 8}, top={"text_config": text, "projection_dim": WIDTH}
    )
    media = images(4, 4, 4, pixel_values=noise(3, 3, 16, 16))
    return Sample(tiny_model(config), make_batches(media, types=prefix_and_suffix))
