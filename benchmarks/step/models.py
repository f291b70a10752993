# SPDX-License-Identifier: Apache-2.0
"""The models of the training-step benchmark, from configs with random weights, and their batches.

LLaVA-1.5-7B at 336 px and Qwen2.5-VL-7B, in bfloat16, as in the second stage of LLaVA's training:
the vision tower is frozen, the projector and the LLM train. One image a sample, no padding (so that
attention takes its fastest kernel, and what PRe adds is divided by the shortest step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """A model and what it trains on.

    Attributes:
        name: for the reports.
        config: makes the transformers config.
        batch: samples a step, where memory allows it.
        text_tokens: of a sample, beside its image.
        grid: patches of an image, (rows, columns).
    """

    name: str
    config: Callable[[], Any]
    batch: int
    text_tokens: int
    grid: tuple[int, int]

    def visual_tokens(self, config: Any) -> int:
        """Of a sample: the patches, or for Qwen the squares of four that it merges."""
        merged = getattr(config.vision_config, "spatial_merge_size", 1)
        return self.grid[0] * self.grid[1] // merged**2

    def positions(self, config: Any) -> int:
        """Of a sample, visual ones and text."""
        return self.visual_tokens(config) + self.text_tokens


def llava_config() -> Any:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 px, an MLP, Vicuna-7B."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=336, patch_size=14, projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, vocab_size=32_064,
            max_position_embeddings=4096, tie_word_embeddings=False,
        ),
        image_token_id=32_000, image_seq_length=576, vision_feature_layer=-2,
        tie_word_embeddings=False,
    )  # fmt: skip


def qwen_config() -> Any:
    """Qwen2.5-VL-7B."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
            "max_position_embeddings": 32_768, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
            },
        },
        image_token_id=151_655, video_token_id=151_656, vision_start_token_id=151_652,
        vision_end_token_id=151_653, tie_word_embeddings=False,
    )  # fmt: skip


def tiny_llava_config() -> Any:
    """The same parts, a few thousand parameters."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=8, projection_dim=16,
        ),
        text_config=LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=64, max_position_embeddings=128,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=0.1,
        ),
        image_token_id=60, image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip


def tiny_qwen_config() -> Any:
    """The same parts, a few thousand parameters."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 16, "out_hidden_size": 64, "fullatt_block_indexes": [1],
        },
        text_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
            "max_position_embeddings": 128, "tie_word_embeddings": False,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
            },
        },
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
        tie_word_embeddings=False,
    )  # fmt: skip


FULL = {
    "llava": Recipe("LLaVA-1.5-7B", llava_config, 16, 192, (24, 24)),
    "qwen": Recipe("Qwen2.5-VL-7B", qwen_config, 8, 128, (64, 72)),  # 896 x 1008 px, 1152 tokens
}
TINY = {
    "llava": Recipe("LLaVA, tiny", tiny_llava_config, 2, 8, (4, 4)),
    "qwen": Recipe("Qwen2.5-VL, tiny", tiny_qwen_config, 2, 8, (8, 8)),
}


def build_model(
    config: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Any:
    """The model with random weights, made on the device itself; frozen tower, training mode."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    config.text_config.use_cache = False
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    tower_of(model).requires_grad_(False)
    if hasattr(model.model, "visual"):
        model.model.visual.merger.requires_grad_(True)  # this is Qwen's projector
    return model.train()


def set_checkpointing(model: Any, on: bool) -> None:
    """Gradient checkpointing of the decoder layers.

    Not by the whole model's method: in transformers 5.17 it makes the tower's embeddings require
    grad, so that backward goes all the way through the frozen tower.
    """
    language_model = model.model.language_model
    if on:
        language_model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        language_model.gradient_checkpointing_disable()


def tower_of(model: Any) -> nn.Module:
    """The vision tower; Qwen's projector is a part of it."""
    parts = model.model
    tower: nn.Module = parts.visual if hasattr(parts, "visual") else parts.vision_tower
    return tower


def make_batch(
    recipe: Recipe,
    config: Any,
    samples: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Batch:
    """The arguments of the model's forward: a word, the image, then the rest of the words.

    All words are labels, as in training on long answers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    visual, length = recipe.visual_tokens(config), recipe.positions(config)
    words = min(config.text_config.vocab_size, config.image_token_id)
    ids = torch.randint(3, words, (samples, length), generator=generator, device=device)
    ids[:, 1 : 1 + visual] = config.image_token_id
    is_image = ids == config.image_token_id
    batch = {"input_ids": ids, "labels": ids.masked_fill(is_image, -100)}
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        patches = samples * recipe.grid[0] * recipe.grid[1]
        columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        shape: tuple[int, ...] = (patches, columns)
        grids = torch.tensor([(1, *recipe.grid)] * samples, device=device)
        batch |= {"image_grid_thw": grids, "mm_token_type_ids": is_image.int()}
    else:
        shape = (samples, 3, *(vision.patch_size * side for side in recipe.grid))
    pixels = torch.randn(shape, generator=generator, device=device)
    return batch | {"pixel_values": pixels.to(dtype)}
