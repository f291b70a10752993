# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA from configs: a CLIP tower, an MLP projector and a Llama decoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from prereg_kernels._util import private
from prereg_kernels._util.settings import check_numbers, require_count
from prereg_kernels.demo.data.packing import IMAGE, Batch
from prereg_kernels.demo.data.scenes import SceneConfig


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the tiny LLaVA.

    Attributes:
        width: hidden size of the tower and of the decoder.
        tower_layers: depth of the tower.
        decoder_layers: depth of the decoder.
        heads: attention heads of each; must divide `width`.
        tower_mlp: width of the tower's feed-forward layers.
        decoder_mlp: width of the decoder's.
        initializer_range: standard deviation of the decoder's initial weights. At this width, the
            usual 0.02 leaves the decoder on its first plateau for longer than a short run lasts.
    """

    width: int = 96
    tower_layers: int = 4
    decoder_layers: int = 6
    heads: int = 4
    tower_mlp: int = 192
    decoder_mlp: int = 256
    initializer_range: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("width", "heads", "tower_mlp", "decoder_mlp"):
            require_count(name, getattr(self, name))
        for name in ("tower_layers", "decoder_layers"):
            require_count(name, getattr(self, name), 1024)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width: expected a multiple of 2 * heads = {2 * self.heads}, got {self.width}"
            )
        if not self.initializer_range > 0:
            raise ValueError(
                f"initializer_range: expected a positive number, got {self.initializer_range!r}"
            )


def attention_implementation(
    device: torch.device | str, *, precision: str, block_mask: bool
) -> str:
    """The fastest attention that is there and right.

    Args:
        device: where the model will run.
        precision: "bf16" or "fp32"; flash-attention has no fp32.
        block_mask: whether sequences hold several questions; flash-attention takes no such mask.

    Returns:
        "flash_attention_2" where flash-attn is installed, the GPU has what it needs (compute
        capability 8.0) and the mask is plain; else "sdpa".
    """
    device = torch.device(device)
    plain_bf16 = precision == "bf16" and not block_mask
    if not plain_bf16 or device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
        return "sdpa"
    return "flash_attention_2" if torch.cuda.get_device_capability(device) >= (8, 0) else "sdpa"


def build_model(
    config: ModelConfig,
    scenes: SceneConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    attention: str = "sdpa",
) -> LlavaForConditionalGeneration:
    """The tiny LLaVA with random fp32 weights, a function of `seed` alone."""
    vision = CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.tower_mlp,
        num_hidden_layers=config.tower_layers,
        num_attention_heads=config.heads,
        image_size=scenes.image_size,
        patch_size=scenes.patch_size,
        projection_dim=config.width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.decoder_mlp,
        num_hidden_layers=config.decoder_layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        # a description has six words a digit
        max_position_embeddings=max(scenes.patches, 6 * scenes.max_digits) + 16,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    llava = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=scenes.patches,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # drop the CLS token: one token a patch remains
        tie_word_embeddings=False,
    )
    setattr(llava, private.ATTENTION, attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(llava)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = None
    return model


def image_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """(B * P, D) visual features as they enter the LLM: tower and projector, image by image."""
    features = model.model.get_image_features(pixel_values=pixel_values)
    # Before 5 it is the rows themselves
    return torch.cat(list(getattr(features, "pooler_output", features)))


def tower_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """(B * P, D) visual features as they enter the projector, image by image."""
    seen: list[Tensor] = []
    projector = model.model.multi_modal_projector
    with projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        image_features(model, pixel_values)
    return seen[0].flatten(0, -2)


def other_scene_anchor(
    model: LlavaForConditionalGeneration, *, before_projector: bool
) -> Callable[[Batch], Tensor]:
    """The control's target: for each image the features of the next one in the micro-batch, as they
    enter the LLM or, `before_projector`, as they leave the tower.

    It has the statistics of the right target and none of its content.
    """
    features = tower_features if before_projector else image_features

    def anchor(batch: Batch) -> Tensor:
        return features(model, batch["pixel_values"].roll(1, dims=0))

    return anchor


MODULES = ("tower", "projector", "llm")
"""The parts that a stage can train."""


def set_trainable(
    model: LlavaForConditionalGeneration, modules: Collection[str], frozen_layers: int = 0
) -> None:
    """Let exactly these parts train, and set `requires_grad` accordingly.

    Args:
        modules: names from `MODULES`.
        frozen_layers: so many of the first decoder layers, and the embeddings below them, stay
            frozen even if "llm" trains.

    Raises:
        ValueError: an unknown module, or more frozen layers than there are.
    """
    unknown = sorted(set(modules) - set(MODULES))
    if unknown:
        raise ValueError(f"trainable: unknown {unknown}; expected some of {list(MODULES)}")
    layers = model.model.language_model.layers
    if not 0 <= frozen_layers <= len(layers):
        raise ValueError(
            f"frozen_layers: expected 0 to {len(layers)}, the decoder's depth, got {frozen_layers}"
        )
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_("tower" in modules)
    model.model.multi_modal_projector.requires_grad_("projector" in modules)
    if "llm" in modules:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        if frozen_layers:
            model.get_input_embeddings().requires_grad_(False)
            layers[:frozen_layers].requires_grad_(False)
