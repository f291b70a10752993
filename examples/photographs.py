# SPDX-License-Identifier: Apache-2.0
"""What `make train-example` trains on: a tiny CLIP, Llama and Qwen2.5-VL, and photographs.

The photographs are those that scikit-image, scikit-learn and matplotlib install. Training and
held-out crops are of different photographs. The questions are about their brightness. In place of
all this, take models of the hub and your own images, in the same files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import skimage
import sklearn
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

SIDE, SEEN = 96, 32  # of a crop, and of what the vision encoder gets of it, in pixels
TRAIN = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coins.png",
    "grass.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png",
    "retina.jpg", "china.jpg",
)  # fmt: skip
HELD_OUT = (
    "coffee.png", "gravel.png", "rocket.jpg", "text.png", "flower.jpg", "grace_hopper.jpg",
    "Minduka_Present_Blue_Pack.png",
)  # fmt: skip
FOLDERS = (
    Path(skimage.__file__).parent / "data",
    Path(sklearn.__file__).parent / "datasets" / "images",
    Path(matplotlib.__file__).parent / "mpl-data" / "sample_data",
)
CROPS = {"train": 10, "held_out": 9}  # of a photograph
MARGIN = 12.0  # of 255: a difference that is asked about


def questions(pixels: NDArray[np.uint8]) -> Iterator[tuple[str, str]]:
    """(question, answer) about a crop, (SIDE, SIDE, 3), from its pixels alone."""
    grey = pixels.mean(axis=2)
    left, right = grey[:, : SIDE // 2].mean(), grey[:, SIDE // 2 :].mean()
    top, bottom = grey[: SIDE // 2].mean(), grey[SIDE // 2 :].mean()
    if abs(left - right) > MARGIN:
        yield "Which side is brighter, left or right?", "left" if left > right else "right"
    if abs(top - bottom) > MARGIN:
        yield "Which half is brighter, top or bottom?", "top" if top > bottom else "bottom"
    if abs(grey.mean() - 128) > MARGIN:
        yield "Is it bright or dark?", "bright" if grey.mean() > 128 else "dark"


def crops(name: str, count: int, random: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """Crops of a photograph, mirrored by chance, so that no answer is the rule."""
    [path] = [folder / name for folder in FOLDERS if (folder / name).exists()]
    image = np.asarray(Image.open(path).convert("RGB"))
    while count:
        y, x = (int(random.integers(0, size - SIDE + 1)) for size in image.shape[:2])
        crop = image[y : y + SIDE, x : x + SIDE]
        crop = crop[:, ::-1] if random.integers(2) else crop
        crop = crop[::-1] if random.integers(2) else crop
        if any(questions(crop)):
            yield crop
            count -= 1


def in_messages(record: dict[str, Any], images: Path) -> dict[str, Any]:
    """A record of LLaVA's format as one of TRL's."""
    messages = []
    for turn in record["conversations"]:
        before, image, text = turn["value"].rpartition("<image>\n")
        parts = [{"type": "image"}] * bool(image) + [{"type": "text", "text": before + text}]
        role = "user" if turn["from"] == "human" else "assistant"
        messages.append({"role": role, "content": parts})
    return {"images": [str(images / record["image"])], "messages": messages}


def write_data(folder: Path) -> None:
    """images/, train.json and held_out.json in LLaVA's format, and train.jsonl in TRL's.

    dataset_info.json names train.json to LLaMA-Factory.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, names in (("train", TRAIN), ("held_out", HELD_OUT)):
        records = []
        for name in names:
            for number, crop in enumerate(crops(name, CROPS[split], random)):
                file = f"{Path(name).stem}_{number}.png"
                Image.fromarray(crop).save(folder / "images" / file)
                asked = list(questions(crop))
                # One conversation to learn from; held out, a sample for each question
                for several in [asked] if split == "train" else [[pair] for pair in asked]:
                    turns = []
                    for question, answer in several:
                        start = "" if turns else "<image>\n"
                        turns.append({"from": "human", "value": start + question})
                        turns.append({"from": "gpt", "value": answer})
                    records.append({"image": file, "conversations": turns})
        (folder / f"{split}.json").write_text(json.dumps(records, indent=1))
        if split == "train":
            images = (folder / "images").resolve()
            rows = [json.dumps(in_messages(record, images)) for record in records]
            (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    columns = {"messages": "conversations", "images": "image"}
    known = {"file_name": "train.json", "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"photographs": known}, indent=1))


def write_clip(folder: Path) -> None:
    """A vision encoder with random weights, and its image processor."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=SEEN, patch_size=8, projection_dim=64,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": SEEN, "width": SEEN}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)


def make_tokenizer(text: str, special: Sequence[str], **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the text. `roles` say what special tokens are for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def write_llama(folder: Path, text: str) -> None:
    """A decoder with random weights, and its tokenizer."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    roles = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    tokenizer = make_tokenizer(text, special, **roles)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=512,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_CHAT = (  # Qwen2.5-VL's, but for videos
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen(folder: Path, text: str) -> None:
    """A whole model with random weights, its tokenizer and its image processor, as on the hub."""
    tokenizer = make_tokenizer(
        text, QWEN_SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = QWEN_CHAT
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": SEEN**2, "longest_edge": SEEN**2}
    ).save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIAL}
    torch.manual_seed(2)
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 4,
        "out_hidden_size": 96, "fullatt_block_indexes": [2], "window_size": 16,
    }  # fmt: skip
    decoder = {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
        "initializer_range": 0.1, "max_position_embeddings": 512,
        "pad_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=decoder, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="to write into")
    place = parser.parse_args().folder
    write_data(place)
    write_clip(place / "clip")
    questions_and_answers = (place / "train.json").read_text()
    write_llama(place / "llama", questions_and_answers)
    write_qwen(place / "qwen", questions_and_answers)
