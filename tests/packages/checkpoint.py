# SPDX-License-Identifier: Apache-2.0
"""What a trainer is given: a tiny LLaVA in a folder with its processor, and made-up questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
SIDE, PATCH = 16, 8  # of an image, in pixels
SAMPLES = 24
IMAGES = (1, 2, 1, 0)  # of a sample, in turn; 0: it is text alone
ANSWERS = ("red", "blue sky", "a green tree", "yes")
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    """A token for each byte, so that any trainer's template is written in it."""
    vocabulary = {token: i for i, token in enumerate(special)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=list(special[4:]),
    )  # fmt: skip


def make_llava(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as LLaVA-1.5's, of some thousand parameters."""
    tokenizer = make_tokenizer()
    size = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=SIDE, patch_size=PATCH, projection_dim=32,
        ),
        text_config=LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=512,
            initializer_range=0.1, pad_token_id=3, eos_token_id=2, bos_token_id=1,
        ),
        image_token_id=4, image_seq_length=(SIDE // PATCH) ** 2, pad_token_id=3,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    return folder


def make_samples(folder: Path) -> list[dict[str, Any]]:
    """{"images": paths, "question", "answer"}: some of two images, some of text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    samples = []
    for number in range(SAMPLES):
        paths = []
        for part in range(IMAGES[number % len(IMAGES)]):
            path = folder / f"{number}_{part}.png"
            pixels = generator.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(path)
            paths.append(str(path))
        answer = ANSWERS[number % len(ANSWERS)]
        samples.append({"images": paths, "question": f"what is in {number}?", "answer": answer})
    return samples


def write_messages(folder: Path, *, is_split: bool, name: str = "data.jsonl") -> Path:
    """The samples as a file of chats, one a line, with "images" beside "messages".

    Args:
        is_split: a question's content is a list of parts, as TRL and axolotl read it; else text
            with "<image>" in it, as LLaMA-Factory and ms-swift do.
    """
    lines = []
    for sample in make_samples(folder):
        pictures, question, answer = sample["images"], sample["question"], sample["answer"]
        asked: Any = "<image>" * len(pictures) + question
        replied: Any = answer
        if is_split:
            asked = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
            replied = [{"type": "text", "text": answer}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
        lines.append(json.dumps({"messages": messages, "images": pictures}))
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


QWEN_IMAGE = 151655  # ms-swift knows its id by heart
QWEN_SPECIAL = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
    "<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": QWEN_IMAGE,
    "<|video_pad|>": 151656,
}  # fmt: skip


QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4,
    "vocab_size": max(QWEN_SPECIAL.values()) + 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": True,
    "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643,
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": QWEN_IMAGE, "video_token_id": QWEN_SPECIAL["<|video_pad|>"],
    "vision_start_token_id": QWEN_SPECIAL["<|vision_start|>"],
    "vision_end_token_id": QWEN_SPECIAL["<|vision_end|>"], "tie_word_embeddings": True,
}  # fmt: skip


def write_qwen_processor(folder: Path, name: str, videos: str, patch: int) -> None:
    """Its classes: the processor's and the video processor's; the images' are Qwen2-VL's."""
    letters = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters | QWEN_SPECIAL, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(QWEN_SPECIAL),
    ).save_pretrained(folder)  # fmt: skip
    (folder / "chat_template.jinja").write_text(QWEN_CHAT)
    # By hand: the processor's own classes do not import without torchvision.
    common = {
        "processor_class": name, "patch_size": patch, "merge_size": 2,
        "size": {"shortest_edge": (4 * patch) ** 2, "longest_edge": (64 * patch) ** 2},
    }  # fmt: skip
    kinds = {
        "image": ("preprocessor", "Qwen2VLImageProcessor"),
        "video": ("video_preprocessor", videos),
    }
    for kind, (file, processor) in kinds.items():
        settings = {f"{kind}_processor_type": processor, **common}
        (folder / f"{file}_config.json").write_text(json.dumps(settings))


def make_qwen(folder: Path) -> Path:
    """A checkpoint as Qwen2.5-VL's, with its ids; small but for the embeddings."""
    write_qwen_processor(folder, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14)
    torch.manual_seed(0)
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": 48, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2]}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config={**QWEN_TEXT, "rope_parameters": rope}, **QWEN_IDS
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_qwen3(folder: Path) -> Path:
    """A checkpoint as Qwen3-VL's, with its ids and deepstack; small but for the embeddings."""
    write_qwen_processor(folder, "Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)
    torch.manual_seed(0)
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16,
        "out_hidden_size": 48, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    text = {**QWEN_TEXT, "head_dim": 12, "rope_parameters": rope}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_IDS)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return folder
