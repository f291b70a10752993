"""Tiny models with their processors, in the formats of the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.packages.checkpoint import make_tokenizer

SIDE, PATCH = 16, 8
LLAMA3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_clip(folder: Path) -> Path:
    """A CLIP vision model."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    return folder


def make_siglip(folder: Path) -> Path:
    """A SigLIP vision model."""
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def make_llama(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama without a chat template, as Vicuna comes."""
    tokenizer = make_tokenizer(("<unk>", "<s>", "</s>", "<pad>"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def make_llama3(folder: Path) -> Path:
    """A Llama 3 with its template and special tokens."""
    special = (
        "<unk>", "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>",
        "<|end_header_id|>",
    )  # fmt: skip
    tokenizer = make_tokenizer(special)
    tokenizer.bos_token, tokenizer.eos_token = "<|begin_of_text|>", "<|eot_id|>"
    tokenizer.pad_token, tokenizer.chat_template = "<|end_of_text|>", LLAMA3
    tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=512,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
        },
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_qwen(folder: Path) -> Path:
    """A Qwen2.5 with its template, tied embeddings and more rows than its tokenizer has tokens."""
    special = ("<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    tokenizer = make_tokenizer(special)
    tokenizer.bos_token, tokenizer.eos_token = None, "<|im_end|>"
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = Qwen2Config(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer) + 12, max_position_embeddings=512,
        initializer_range=0.1, tie_word_embeddings=True, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
