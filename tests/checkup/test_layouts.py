# SPDX-License-Identifier: Apache-2.0
"""Where tokens look, proven: with attention taken out of the tower, changing the pixels in the
middle of a token's box changes that token and no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from prereg_kernels.attach import families
from prereg_kernels.attach.families import family_of_type
from prereg_kernels.attach.family import Family
from prereg_kernels.checkup.features import visual_features
from prereg_kernels.checkup.images.datasets import Sample
from prereg_kernels.checkup.images.image_batches import ImageBatches
from prereg_kernels.checkup.images.layouts import family_with_layout
from prereg_kernels.checkup.images.patches import TokenGrid, regular_grid
from prereg_kernels.checkup.images.processing import make
from prereg_kernels.checkup.loading import Loaded
from tests.attach.families.models import CASES as MODELS
from tests.attach.families.models import TILES, llava_next
from tests.checkup.pictures import QWEN_PROCESSOR, local_tower, make_loaded, noise, pillow

SQUARE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def clip(**more: Any) -> Any:
    return pillow("CLIP", **{**SQUARE, **more})


def qwen() -> Any:
    return pillow("Qwen2VL", **QWEN_PROCESSOR)


def tiles() -> Any:
    return pillow("LlavaNext", **SQUARE, image_grid_pinpoints=TILES["image_grid_pinpoints"])


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
        lambda: pillow("Llava", **SQUARE, do_pad=True),
        (50, 90),
    ),
    "llava_next, wide": ("llava_next", tiles, (64, 128)),
    "llava_next, high": ("llava_next", tiles, (130, 70)),
    "llava_next, padded": ("llava_next", tiles, (60, 100)),
    "qwen2_vl": ("qwen2_vl", qwen, (32, 48)),
    "qwen2_5_vl": ("qwen2_5_vl", qwen, (24, 40)),
    "qwen2_5_vl, reduced": ("qwen2_5_vl", qwen, (151, 251)),
    "qwen2_5_vl, enlarged": ("qwen2_5_vl", qwen, (9, 14)),
    "qwen3_vl": ("qwen3_vl", qwen, (40, 24)),
}


class Several:
    """A set of images."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.name(index), self.images[index])


def one(image: np.ndarray) -> Several:
    return Several([image])


def tokens_of(loaded: Loaded, image: np.ndarray) -> torch.Tensor:
    batch = ImageBatches(loaded, one(image))[0]
    return visual_features(loaded.model, batch.inputs)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_token_sees_its_box(case: str) -> None:
    family, processor, size = CASES[case]
    assert_sees(make_loaded(family, processor()), size)


@pytest.mark.parametrize("height", [32, 40])
def test_rows_of_padding_are_cut_off(height: int) -> None:
    """Of four rows of patches in a tile, the first and the last hold padding (and at 40, a strip of
    the image with it)."""
    config = llava_next()
    config.vision_config.patch_size = 4
    torch.manual_seed(0)
    model = hf.LlavaNextForConditionalGeneration(config).eval()
    grid = assert_sees(Loaded(model, tiles(), None, ()), (height, 128))
    assert grid.shape == (2, 8)
    assert grid.boxes[grid.row >= 0][0, 0] == (0 if height == 32 else 4)


def assert_sees(loaded: Loaded, size: tuple[int, int]) -> TokenGrid:
    """Change the pixel in the middle of each token's box."""
    local_tower(loaded.model)
    image = noise(*size)
    grid = ImageBatches(loaded, one(image))[0].images[0].grid
    assert grid is not None
    before = tokens_of(loaded, image)
    assert len(before) == len(grid)
    placed = np.flatnonzero(grid.row >= 0)
    assert len(placed) == grid.shape[0] * grid.shape[1]
    assert np.isnan(grid.boxes[grid.row < 0]).all()
    seen = 0
    for token, box in zip(placed.tolist(), grid.boxes[placed], strict=True):
        centre = (box[:2] + box[2:]) / 2
        y, x = np.floor(centre).astype(int)
        inside = 0 <= y < size[0] and 0 <= x < size[1]
        if not inside:
            continue
        changed = image.copy()
        changed[y, x] = 255 - changed[y, x] // 2 * 2
        after = tokens_of(loaded, changed)
        different = (after != before).any(dim=1).nonzero().flatten().tolist()
        assert [other for other in different if other in placed] == [token]
        seen += 1
    assert seen == len(placed)
    return grid


def test_a_class_token_has_no_place() -> None:
    loaded = make_loaded("llava", clip())
    loaded.config.vision_feature_select_strategy = "full"
    batch = ImageBatches(loaded, one(noise(16, 16)))[0]
    grid = batch.images[0].grid
    assert grid is not None
    assert len(visual_features(loaded.model, batch.inputs)[0]) == len(grid) == 5
    assert np.isnan(grid.boxes[0]).all()
    assert grid.row.tolist() == [-1, 0, 0, 1, 1]


def test_other_families_are_named() -> None:
    with pytest.raises(ValueError, match="model_type 'gemma3': the places of its visual tokens"):
        family_with_layout("gemma3")
    loaded = make_loaded("llava", clip())
    loaded.config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="'llava' with a tower of model_type 'pixtral'"):
        ImageBatches(loaded, one(noise(16, 16)))[0]


def test_images_of_different_tiles_in_one_batch() -> None:
    """Padding, of tokens and of tiles, changes nothing."""
    loaded = make_loaded("llava_next", tiles())
    pictures = [noise(64, 128), noise(100, 100, seed=1), noise(128, 64, seed=2)]
    batch = ImageBatches(loaded, Several(pictures))[0]
    together = visual_features(loaded.model, batch.inputs)[2]
    alone = [
        visual_features(loaded.model, ImageBatches(loaded, one(picture))[0].inputs)[2]
        for picture in pictures
    ]
    assert len({len(x) for x in alone}) > 1
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_an_entry_of_the_table_says_how_batches_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout of one's own, markers, and an argument for token types."""
    loaded = make_loaded("llava", clip())
    usual = ImageBatches(loaded, one(noise(16, 16)))[0]

    def upside_down(config: Any, processor: Any, size: Any, processed: Any) -> TokenGrid:
        grid = regular_grid(size, (2, 2), resized=size)
        return TokenGrid(size, (2, 2), 1 - grid.row, grid.column, grid.boxes[::-1])

    loaded.config.before_id, loaded.config.after_id = 3, 4
    mine = Family(
        "Mine", ("llava",), layout=upside_down, markers=("before_id", "after_id"),
        token_types="kinds",
    )  # fmt: skip
    monkeypatch.setattr(families, "FAMILIES", (mine,))
    batch = ImageBatches(loaded, one(noise(16, 16)))[0]
    token = loaded.config.image_token_id
    assert usual.inputs["input_ids"].tolist() == [[token] * 4]
    assert batch.inputs["input_ids"].tolist() == [[3, *[token] * 4, 4]]
    assert batch.inputs["kinds"].tolist() == [[0, 1, 1, 1, 1, 0]]
    grid = batch.images[0].grid
    assert grid is not None
    assert grid.row.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_markers_and_processors_are_there(model_type: str) -> None:
    """In the config, and in transformers: a name that is not would be left out without a word."""
    config = MODELS[model_type].config()
    family = family_of_type(config.model_type)
    assert family is not None
    assert all(isinstance(getattr(config, name, None), int) for name in family.markers)
    if family.processor is not None:
        name, settings = family.processor(config)
        assert issubclass(getattr(hf, name), hf.image_processing_utils.BaseImageProcessor)
        assert getattr(hf, name)(**settings) is not None


def test_bounds_of_a_processor_that_ignores_size() -> None:
    """As Qwen2VLImageProcessor of transformers 4.57 does; what a file says of both stays."""

    class Ignores:
        def __init__(self, min_pixels: int = 1, max_pixels: int = 2, size: Any = None) -> None:
            self.bounds = min_pixels, max_pixels

    size = {"shortest_edge": 100, "longest_edge": 900}
    assert make(Ignores, {"size": size}).bounds == (100, 900)
    assert make(Ignores, {"size": size, "max_pixels": 500}).bounds == (100, 500)
    assert make(Ignores, {"size": {"height": 3, "width": 3}}).bounds == (1, 2)
