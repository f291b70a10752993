# SPDX-License-Identifier: Apache-2.0
"""What the examples train: a LLaVA of a few thousand parameters, and questions about made images.

In place of this, take a model and its processor by `from_pretrained`, and your own data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 230)}
WORDS = ["<pad>", "<eos>", "<image>", "user:", "assistant:", "which", "colours", *COLOURS]


def make_processor() -> LlavaProcessor:
    """Words to ids, and images to 16 x 16 pixels: four patches, four visual tokens."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size=size, crop_size=size)
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip


CHAT = (  # a template of its own, as the tokenizer knows few words
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """A CLIP tower of two layers, a projector, a Llama of four; in eval mode, as `from_pretrained`
    gives a model."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.1,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=2, image_seq_length=4, pad_token_id=0
    )
    return LlavaForConditionalGeneration(config).eval()


def make_samples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """One or two images each, noisy and of one colour: {"images", "answer"}."""
    random, samples = np.random.default_rng(seed), []
    for _ in range(count):
        names = [str(name) for name in random.choice(list(COLOURS), random.integers(1, 3))]
        noise = [random.integers(-30, 30, (16, 16, 3)) for _ in names]
        pixels = [np.clip(COLOURS[n] + x, 0, 255) for n, x in zip(names, noise, strict=True)]
        images = [Image.fromarray(x.astype(np.uint8)) for x in pixels]
        samples.append({"images": images, "answer": " ".join(names)})
    return samples


def make_folder() -> str:
    """A new folder, which is the same one on all ranks, as what a trainer writes to has to be."""
    folder = tempfile.mkdtemp() if PartialState(cpu=True).is_main_process else None
    return broadcast_object_list([folder])[0]


class Collator:
    """Samples to a batch; the labels are the answers."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [
            f"user: {'<image> ' * len(s['images'])}which colours assistant: {s['answer']} <eos>"
            for s in samples
        ]
        images = [image for s in samples for image in s["images"]]
        batch = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        asked = (ids == WORDS.index("assistant:")).cumsum(1) == 0
        skip = asked | (ids == WORDS.index("assistant:")) | (ids == 0)
        names = ("input_ids", "attention_mask", "pixel_values")
        return {name: batch[name] for name in names} | {"labels": ids.masked_fill(skip, -100)}
