"""Where tokens look, proven: with attention taken out of the tower, changing the pixels in the
middle of a token's box changes that token and no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from prereg_kernels.diagnostics.batches import ImageBatches
from prereg_kernels.diagnostics.datasets import Sample
from prereg_kernels.diagnostics.features import visual_features
from prereg_kernels.diagnostics.layouts import layout_of
from prereg_kernels.diagnostics.loading import Loaded
from tests.diagnostics.pictures import QWEN_PROCESSOR, local_tower, make_loaded, noise

SQUARE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def clip(**more: Any) -> Any:
    return hf.CLIPImageProcessorPil(**{**SQUARE, **more})


def qwen() -> Any:
    return hf.Qwen2VLImageProcessorPil(**QWEN_PROCESSOR)


CASES = {
    "llava, square": ("llava", clip, (96, 96)),
    "llava, cropped at the sides": ("llava", clip, (96, 144)),
    "llava, cropped above and below": ("llava", clip, (130, 100)),
    "llava, enlarged": ("llava", clip, (20, 14)),
    "llava, stretched": (
        "llava",
        lambda: clip(size={"height": 16, "width": 16}, do_center_crop=False),
        (64, 128),
    ),
    "llava, padded by the crop": ("llava", lambda: clip(size={"shortest_edge": 12}), (48, 48)),
    "llava, padded to a square": (
        "llava",
        lambda: hf.LlavaImageProcessorPil(**SQUARE, do_pad=True),
        (50, 90),
    ),
    "qwen2_vl": ("qwen2_vl", qwen, (32, 48)),
    "qwen2_5_vl": ("qwen2_5_vl", qwen, (24, 40)),
    "qwen2_5_vl, reduced": ("qwen2_5_vl", qwen, (151, 251)),
    "qwen2_5_vl, enlarged": ("qwen2_5_vl", qwen, (9, 14)),
    "qwen3_vl": ("qwen3_vl", qwen, (40, 24)),
}


class One:
    """A set of one image."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "it"

    def __getitem__(self, index: int) -> Sample:
        return Sample("it", self.image)


def tokens_of(loaded: Loaded, image: np.ndarray) -> torch.Tensor:
    batch = ImageBatches(loaded, One(image))[0]
    return visual_features(loaded.model, batch.inputs)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_token_sees_its_box(case: str) -> None:
    family, processor, size = CASES[case]
    loaded = make_loaded(family, processor())
    local_tower(loaded.model)
    image = noise(*size)
    grid = ImageBatches(loaded, One(image))[0].images[0].grid
    assert grid is not None
    before = tokens_of(loaded, image)
    assert len(before) == len(grid) == grid.shape[0] * grid.shape[1]
    seen = 0
    for token, box in enumerate(grid.boxes):
        centre = (box[:2] + box[2:]) / 2
        y, x = np.floor(centre).astype(int)
        inside = 0 <= y < size[0] and 0 <= x < size[1]
        if not inside:
            continue
        changed = image.copy()
        changed[y, x] = 255 - changed[y, x] // 2 * 2
        after = tokens_of(loaded, changed)
        different = (after != before).any(dim=1).nonzero().flatten().tolist()
        assert different == [token]
        seen += 1
    assert seen == len(grid)


def test_a_class_token_has_no_place() -> None:
    loaded = make_loaded("llava", clip())
    loaded.config.vision_feature_select_strategy = "full"
    batch = ImageBatches(loaded, One(noise(16, 16)))[0]
    grid = batch.images[0].grid
    assert grid is not None
    assert len(visual_features(loaded.model, batch.inputs)[0]) == len(grid) == 5
    assert np.isnan(grid.boxes[0]).all()
    assert grid.row.tolist() == [-1, 0, 0, 1, 1]


def test_other_families_are_named() -> None:
    with pytest.raises(ValueError, match="model_type 'gemma3': the places of its visual tokens"):
        layout_of("gemma3")
    loaded = make_loaded("llava", clip())
    loaded.config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="'llava' with a tower of model_type 'pixtral'"):
        ImageBatches(loaded, One(noise(16, 16)))[0]
