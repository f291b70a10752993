# SPDX-License-Identifier: Apache-2.0
"""Processors that take videos, where torchvision is missing, as in the tests' environment."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLImageProcessor

from prereg_kernels.train.models import load_processor
from tests.packages.checkpoint import make_qwen

TEXT = "<|vision_start|><|image_pad|><|vision_end|>Red?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen(tmp_path_factory.mktemp("qwen"))


def test_images_and_text(folder: Path) -> None:
    """As its image processor and its tokenizer make them, each image's token as often as needed."""
    with pytest.raises(ImportError, match="Torchvision"):
        AutoProcessor.from_pretrained(folder)
    processor = load_processor(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (84, 112, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    batch = processor(text=[TEXT, "Hi"], images=[[image], []], padding=True, return_tensors="pt")
    own = Qwen2VLImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    assert batch["pixel_values"].equal(own["pixel_values"])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 8]]
    whole = TEXT.replace("<|image_pad|>", "<|image_pad|>" * 12)
    for row, text in enumerate((whole, "Hi")):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert ids.tolist() == processor.tokenizer(text)["input_ids"]
    is_image = batch["input_ids"] == processor.image_token_id
    assert batch["mm_token_type_ids"].equal(is_image.to(batch["mm_token_type_ids"].dtype))
    with pytest.raises(
        ImportError, match=r"videos: expected torchvision.*; .*install.* torch.*2\."
    ):
        processor(text=["<|video_pad|>"], videos=[torch.zeros(2, 3, 28, 28)])


def test_what_is_saved_has_the_settings_of_videos(folder: Path, tmp_path: Path) -> None:
    """So that it takes videos again where torchvision is; workers get it as it is."""
    processor: Any = load_processor(folder)
    processor.chat_template = "{{ messages[0]['content'] }}"
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    given = json.loads((folder / "video_preprocessor_config.json").read_text())
    assert saved["video_processor"] == given
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"
    again = pickle.loads(pickle.dumps(copy.deepcopy(load_processor(tmp_path))))
    assert again.chat_template == processor.chat_template
    assert again.to_dict() == processor.to_dict()
