"""The order in which each model family lays out an image's tokens, and what each of them covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from prereg_kernels.diagnostics.patches import TokenGrid, centre_window, regular_grid

Layout = Callable[[Any, Any, tuple[int, int], Mapping[str, Tensor]], TokenGrid]
"""From the model's config, its image processor, an image's (height, width) and what the processor
made of that image alone, to the places of its tokens."""


def layout_of(model_type: str) -> Layout:
    """The layout of a family, by `config.model_type`.

    Raises:
        ValueError: a family whose layout is not known here.
    """
    if model_type not in LAYOUTS:
        raise ValueError(
            f"model_type {model_type!r}: the places of its visual tokens are not known here; "
            f"expected one of {', '.join(LAYOUTS)}. Other families can be measured from Python, "
            "with batches of your own: see checkup()"
        )
    return LAYOUTS[model_type]


def llava(
    config: Any, processor: Any, size: tuple[int, int], processed: Mapping[str, Tensor]
) -> TokenGrid:
    """One token a patch, row by row, of the resized and centre-cropped image."""
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(
            f"model_type 'llava' with a tower of model_type {vision.model_type!r}: the places of "
            "its visual tokens are not known here; expected clip_vision_model or "
            "siglip_vision_model"
        )
    height, width = processed["pixel_values"].shape[-2:]
    seen = (int(height), int(width))
    shape = (seen[0] // vision.patch_size, seen[1] // vision.patch_size)
    source = size
    offset = (0, 0)
    if getattr(processor, "do_pad", False):  # LLaVA's own: first to a square, around the centre
        source = (max(size), max(size))
        offset = ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2)
    resized = _resized(processor, source)
    crop = getattr(processor, "do_center_crop", False)
    window = centre_window(resized, seen) if crop else (0, 0, *resized)
    # patches that do not fill the tower's input are cut off at the right and at the bottom
    cell = vision.patch_size
    window = (window[0], window[1], window[0] + shape[0] * cell, window[1] + shape[1] * cell)
    grid = regular_grid(source, shape, resized=resized, window=window)
    boxes = grid.boxes - np.array([*offset, *offset])
    grid = TokenGrid(size, shape, grid.row, grid.column, boxes)
    keeps_class = config.vision_feature_select_strategy == "full"
    return _prepended(grid, int(keeps_class and vision.model_type == "clip_vision_model"))


def qwen(
    config: Any, processor: Any, size: tuple[int, int], processed: Mapping[str, Tensor]
) -> TokenGrid:
    """One token a block of merged patches, row by row, of the image resized to whole blocks."""
    frames, rows, columns = processed["image_grid_thw"][0].tolist()
    assert frames == 1
    merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    return regular_grid(
        size, (rows // merge, columns // merge), resized=(rows * patch, columns * patch)
    )


def _resized(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) after the processor's resizing."""
    from transformers.image_transforms import get_resize_output_image_size
    from transformers.image_utils import ChannelDimension

    if not processor.do_resize:
        return size
    target = processor.size
    if target.get("height") and target.get("width"):
        return target["height"], target["width"]
    if target.get("shortest_edge") and not target.get("longest_edge"):
        image = np.broadcast_to(np.uint8(0), (3, *size))  # only its shape is looked at
        height, width = get_resize_output_image_size(
            image,
            size=target["shortest_edge"],
            default_to_square=False,
            input_data_format=ChannelDimension.FIRST,
        )
        return height, width
    raise ValueError(
        f"image processor: expected a size with height and width, or shortest_edge; got {target}"
    )


def _prepended(grid: TokenGrid, count: int) -> TokenGrid:
    """With so many tokens before it that stand for no place."""
    nowhere = np.full(count, -1, dtype=np.int64)
    return TokenGrid(
        grid.size,
        grid.shape,
        np.concatenate([nowhere, grid.row]),
        np.concatenate([nowhere, grid.column]),
        np.concatenate([np.full((count, 4), np.nan), grid.boxes]),
    )


LAYOUTS: dict[str, Layout] = {
    "llava": llava,
    "qwen2_vl": qwen,
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
}
