"""Types that resize every image to the size of the tower."""

from __future__ import annotations

from typing import Any

from tests.attach.families.models import noise
from tests.zoo.parts import images, make_batches, tiny_config, tiny_model
from tests.zoo.sample import Sample, case


def three_images(config: Any, tokens: int) -> Sample:
    pixels = noise(3, 3, 16, 16)
    batches = make_batches(images(tokens, tokens, tokens, pixel_values=pixels))
    return Sample(tiny_model(config), batches)


@case("vipllava")
def vipllava() -> Sample:
    config = tiny_config(
        "vipllava", vision={"num_hidden_layers": 3},
        top={"vision_feature_layers": [-1, -2], "image_seq_length": 16},
    )  # fmt: skip
    return three_images(config, 16)


@case("aya_vision")
def aya_vision() -> Sample:
    return three_images(tiny_config("aya_vision"), 4)


@case("cohere2_vision")
def cohere2_vision() -> Sample:
    return three_images(tiny_config("cohere2_vision", top={"alignment_intermediate_size": 64}), 4)


@case("deepseek_vl")
def deepseek_vl() -> Sample:
    return three_images(tiny_config("deepseek_vl"), 16)


@case("llama4")
def llama4() -> Sample:
    config = tiny_config(
        "llama4",
        text={
            "intermediate_size_mlp": 40, "attention_chunk_size": 64, "interleave_moe_layer_step": 2,
        },
        vision={
            "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            "intermediate_size": 128, "rope_parameters": None,
        },
    )  # fmt: skip
    return three_images(config, 4)
