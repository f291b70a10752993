"""What `make train-example` trains on: a tiny CLIP, a tiny Llama, and questions about photographs.

The first argument is the folder to write. The photographs are those that scikit-image, scikit-learn
and matplotlib install. Training and held-out crops are of different photographs. In place of all
this, take models of the hub and your own images, in the same files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

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


def write_data(folder: Path) -> None:
    """images/, train.json and held_out.json, in LLaVA's format."""
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


def write_llama(folder: Path, text: str) -> None:
    """A decoder with random weights, and a byte-level BPE tokenizer of the text."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_data(place)
    write_clip(place / "clip")
    write_llama(place / "llama", (place / "train.json").read_text())
