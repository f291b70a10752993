# SPDX-License-Identifier: Apache-2.0
"""A LLaVA of a few thousand parameters, from configs, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 39
PATCHES = 4  # of an image
WIDTH = 24
LAYERS = 4


def tiny_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    """16 x 16 images of four patches, a decoder of four layers, 40 words; float32, training."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=8, projection_dim=16,
        ),
        text_config=LlamaConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS,
            num_attention_heads=2, num_key_value_heads=2, vocab_size=40,
            max_position_embeddings=64, initializer_range=0.2,
        ),
        image_token_id=IMAGE_TOKEN, image_seq_length=PATCHES,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).train()


def make_batch(images: tuple[int, ...] = (1, 1), length: int = 14, seed: int = 0) -> dict[str, Any]:
    """A sequence for each entry of `images`, with so many images in it.

    The visual tokens are on the left; the next two positions have no label.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, 30, (len(images), length), generator=generator)
    labels = input_ids.clone()
    for row, count in enumerate(images):
        input_ids[row, : count * PATCHES] = IMAGE_TOKEN
        labels[row, : count * PATCHES + 2] = -100
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
    }
    if sum(images):
        batch["pixel_values"] = torch.randn(sum(images), 3, 16, 16, generator=generator)
    return batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the model's parameters; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
