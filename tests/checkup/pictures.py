# SPDX-License-Identifier: Apache-2.0
"""Small models on disk and small image sets in the formats that people have them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerFast

from prereg_kernels.checkup.images.processing import make, pillow_class
from prereg_kernels.checkup.loading import Loaded
from tests.attach.families.models import CASES as FAMILIES
from tests.attach.families.models import make_model
from tests.zoo import sample

QWEN_PROCESSOR = {
    "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96},
}  # fmt: skip


def make_loaded(family: str, processor: Any) -> Loaded:
    """A tiny model of the family, in eval mode, with that image processor and no tokenizer.

    family: one of `tests/attach/families/models.py`, or of the zoo.
    """
    model = make_model(family) if family in FAMILIES else sample(family).model
    return Loaded(model.eval(), processor, None, ())


def pillow(name: str, **settings: Any) -> Any:
    """transformers' image processor of that name that works on Pillow's images."""
    cls = pillow_class(f"{name}ImageProcessor")
    assert cls is not None
    return make(cls, settings)


def save_model(directory: Path, family: str = "qwen2_5_vl", processor: bool = True) -> Path:
    """A model directory: weights, config and, unless told otherwise, an image processor."""
    make_model(family).save_pretrained(directory)
    if processor:
        settings = {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_PROCESSOR}
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture, (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_folder(root: Path, count: int = 8, size: tuple[int, int] = (32, 40)) -> Path:
    """Images in two class folders, "dark" and "light", and masks with two objects at
    `root / "masks"`: object 1 in the left half, 2 in the right, 0 in the upper quarter."""
    for i in range(count):
        name = "dark" if i % 2 else "light"
        picture = noise(*size, seed=i) // 4 + (0 if i % 2 else 190)
        for where, content in (("images", picture), ("masks", two_objects(*size))):
            path = root / where / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content.astype(np.uint8)).save(path)
    return root


def two_objects(height: int, width: int) -> NDArray[np.int64]:
    """(H, W): 1 at the left, 2 at the right, 0 in the upper quarter."""
    mask = np.ones((height, width), dtype=np.int64)
    mask[:, width // 2 :] = 2
    mask[: height // 4] = 0
    return mask


def local_tower(model: torch.nn.Module) -> None:
    """Take attention out of the vision tower, so that a token sees its own patch only."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tower = "vision" in name or "visual" in name
            if tower and (".attn.proj." in name or ".out_proj." in name):
                parameter.zero_()


def save_tokenizer(directory: Path, template: str) -> None:
    """A tokenizer beside the model there, with that chat template; it knows the template's words
    and the model's image token, "<image>"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    image = AutoConfig.from_pretrained(directory).image_token_id
    words = ["hello", "bye", "look", "<image>"]
    ids = [*range(3, 2 + len(words)), image]
    vocabulary = dict(zip(words, ids, strict=True)) | {"unknown": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="unknown")
    fast.chat_template = template
    fast.save_pretrained(directory)
