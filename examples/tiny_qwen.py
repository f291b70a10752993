# SPDX-License-Identifier: Apache-2.0
"""A Qwen2.5-VL of a few thousand parameters, and batches for it, on the images of `tiny`."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import COLOURS
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

PAD, IMAGE, VIDEO, START, END, ASK = range(6)  # the words; the colours follow
FORWARD = signature(Qwen2_5_VLForConditionalGeneration.forward)
TAKES_KINDS = "mm_token_type_ids" in FORWARD.parameters  # from transformers 5 on


def make_qwen(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A tower of two layers, a Qwen2.5 of four; in eval mode, as `from_pretrained` gives it."""
    torch.manual_seed(seed)
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 48, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 9,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
        "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


class QwenCollator:
    """Samples to a batch: a sample's images become one, of 16 x 16 or 16 x 32 pixels."""

    def __init__(self) -> None:
        self.pixels = Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        )

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        wide = [Image.fromarray(np.concatenate(s["images"], axis=1)) for s in samples]
        batch = dict(self.pixels(images=wide, return_tensors="pt"))
        ids, labels = [], []
        for sample, grid in zip(samples, batch["image_grid_thw"], strict=True):
            prompt = [START, *[IMAGE] * (int(grid.prod()) // 4), END, ASK]  # 2 x 2 patches each
            answer = [ASK + 1 + list(COLOURS).index(name) for name in sample["answer"].split()]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        batch["input_ids"] = pad_sequence(ids, batch_first=True, padding_value=PAD)
        batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        batch["attention_mask"] = (batch["input_ids"] != PAD).long()
        if TAKES_KINDS:
            batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
        return batch
