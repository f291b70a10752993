# SPDX-License-Identifier: Apache-2.0
"""The end of `make train-example`: its models in plain transformers, and whether they have learned.

The first argument is the folder of the runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    Qwen2VLImageProcessor,
)

MARGIN = 0.25  # above the commonest answer, on photographs that training has not seen


def prepare_llava(folder: Path, chat: list[dict[str, Any]], image: Image.Image) -> BatchFeature:
    """A batch of one question, by the model's own processor."""
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")


def prepare_qwen(folder: Path, chat: list[dict[str, Any]], image: Image.Image) -> BatchFeature:
    """The same by the parts of Qwen2.5-VL's processor, which needs torchvision as a whole."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2VLImageProcessor.from_pretrained(folder)
    batch = processor(image, return_tensors="pt")
    count = int(batch["image_grid_thw"].prod()) // processor.merge_size**2
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    batch.update(
        tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
    )
    is_image = batch["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    batch["mm_token_type_ids"] = is_image.int()
    return batch


def main(place: Path) -> None:
    """Have each model answer a question; the share of right answers is above the commonest's."""
    sample = json.loads((place / "held_out.json").read_text())[0]
    question = sample["conversations"][0]["value"].removeprefix("<image>\n")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    image = Image.open(place / "images" / sample["image"])
    for name, prepare in (("pre", prepare_llava), ("qwen_pre", prepare_qwen)):
        model = AutoModelForImageTextToText.from_pretrained(place / name)
        tokenizer = AutoTokenizer.from_pretrained(place / name)
        batch = prepare(place / name, chat, image)
        written = model.generate(**batch, max_new_tokens=8, do_sample=False)[0]
        answer = tokenizer.decode(written[batch["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{name}: {sample['image']}: {question} {answer.strip()}")
        found = json.loads((place / name / "evaluation.json").read_text())
        if found["exact_match"] < found["commonest"] + MARGIN:
            sys.exit(f"expected {MARGIN:.0%} above the commonest answer, got {found}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
