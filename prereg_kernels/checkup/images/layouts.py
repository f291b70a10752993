# SPDX-License-Identifier: Apache-2.0
"""Layouts: the order of an image's tokens, and what each of them covers.

A `Family` names one. "crop": LLaVA's. "tiles": LLaVA-NeXT's. "blocks": Qwen2-VL's and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prereg_kernels.attach.families import FAMILIES, family_of_type
from prereg_kernels.attach.family import Family
from prereg_kernels.checkup.images.patches import TokenGrid, centre_window, regular_grid

Layout = Callable[[Any, Any, tuple[int, int], Mapping[str, Tensor]], TokenGrid]
"""From the model's config, its image processor, an image's (height, width) and what the processor
made of that image alone, to the places of its tokens."""


def family_with_layout(model_type: str) -> Family:
    """The family of a `config.model_type`, if the places of its visual tokens are known.

    Raises:
        ValueError: they are not.
    """
    family = family_of_type(model_type)
    if family is None or family.layout is None:
        known = [name for family in FAMILIES if family.layout for name in family.model_types]
        raise ValueError(
            f"model_type {model_type!r}: the places of its visual tokens are not known here; "
            f"expected one of {', '.join(known)}. Other families can be measured from Python, "
            "with batches of your own: see checkup()"
        )
    return family


def layout_of(family: Family) -> Layout:
    """What finds the places of a family's tokens."""
    assert family.layout is not None
    return family.layout if callable(family.layout) else LAYOUTS[family.layout]


def check_tower(model_type: str, config: Any) -> None:
    """Raise ValueError unless the layout is known for the vision encoder of that config."""
    family = family_with_layout(model_type)
    tower = config.vision_config.model_type if family.towers else None
    if family.towers and tower not in family.towers:
        raise ValueError(
            f"model_type {model_type!r} with a tower of model_type {tower!r}: the places of its "
            f"visual tokens are not known here; expected {' or '.join(family.towers)}"
        )


def cropped(
    config: Any, processor: Any, size: tuple[int, int], processed: Mapping[str, Tensor]
) -> TokenGrid:
    """One token a patch, row by row, of the resized and centre-cropped image."""
    vision = config.vision_config
    height, width = processed["pixel_values"].shape[-2:]
    cut = (int(height), int(width))
    shape = (cut[0] // vision.patch_size, cut[1] // vision.patch_size)
    source = _padded(processor, size)
    offset = ((source[0] - size[0]) // 2, (source[1] - size[1]) // 2)
    resized = _resized(processor, source)
    crop = getattr(processor, "do_center_crop", False)
    window = centre_window(resized, cut) if crop else (0, 0, *resized)
    # patches that do not fill the tower's input are cut off at the right and at the bottom
    cell = vision.patch_size
    window = (window[0], window[1], window[0] + shape[0] * cell, window[1] + shape[1] * cell)
    grid = regular_grid(source, shape, resized=resized, window=window)
    boxes = grid.boxes - np.array([*offset, *offset])
    grid = TokenGrid(size, shape, grid.row, grid.column, boxes)
    keeps_class = config.vision_feature_select_strategy == "full"
    return _prepended(grid, int(keeps_class and vision.model_type == "clip_vision_model"))


def tiled(
    config: Any, processor: Any, size: tuple[int, int], processed: Mapping[str, Tensor]
) -> TokenGrid:
    """First the small copy of the whole image, then the patches of all tiles, row by row over the
    tiles' seams, without the rows (or columns) that are all padding, a newline after each row.

    The copy's tokens have no place here: they repeat what the tiles show.
    """
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    vision = config.vision_config
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            "model_type 'llava_next' with vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r}: expected 'default'"
        )
    side, cell = vision.image_size, vision.patch_size
    tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    whole = (tiles[0] * side, tiles[1] * side)
    image = np.broadcast_to(np.uint8(0), (3, *size))  # only its shape is looked at
    resized = get_patch_output_size(image, whole, ChannelDimension.FIRST)
    cells = (whole[0] // cell, whole[1] // cell)
    # what the model cuts off, in cells: of the side that the image's proportions leave empty
    cut = [0, 0]
    flat = size[1] / size[0] > cells[1] / cells[0]
    filled = size[0] * cells[1] / size[1] if flat else size[1] * cells[0] / size[0]
    cut[0 if flat else 1] = (cells[0 if flat else 1] - int(round(filled, 7))) // 2
    shape = (cells[0] - 2 * cut[0], cells[1] - 2 * cut[1])
    top, left = (cut[i] * cell - (whole[i] - resized[i]) // 2 for i in (0, 1))
    window = (top, left, top + shape[0] * cell, left + shape[1] * cell)
    grid = regular_grid(size, shape, resized=resized, window=window)
    return _prepended(_with_newlines(grid), (side // cell) ** 2)


def merged(
    config: Any, processor: Any, size: tuple[int, int], processed: Mapping[str, Tensor]
) -> TokenGrid:
    """One token a block of merged patches, row by row, of the image resized to whole blocks."""
    frames, rows, columns = processed["image_grid_thw"][0].tolist()
    assert frames == 1
    merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    return regular_grid(
        size, (rows // merge, columns // merge), resized=(rows * patch, columns * patch)
    )


def pixels_made(family: Family, processor: Any, size: tuple[int, int]) -> int:
    """Of the largest picture that the processor makes of an image on its way.

    LLaVA's processors pad to a square or resize by the shorter edge, and crop later: of a strip of
    1 x 60,000 pixels they make billions.
    """
    target = getattr(processor, "size", None) or {}
    if family.layout == "crop":
        source = _padded(processor, size)
        sizes = [source, _resized(processor, source)]
    else:
        sizes = [(target.get("height") or 0, target.get("width") or 0)]
    return max(height * width for height, width in sizes)


def _padded(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) before resizing: LLaVA's own pads to a square, around the centre."""
    return (max(size), max(size)) if getattr(processor, "do_pad", False) else size


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


def _with_newlines(grid: TokenGrid) -> TokenGrid:
    """With a token after each row that stands for no place."""
    rows, columns = grid.shape

    def widened(values: NDArray[Any], fill: float) -> NDArray[Any]:
        table = values.reshape(rows, columns, *values.shape[1:])
        newline = np.full((rows, 1, *values.shape[1:]), fill, dtype=values.dtype)
        return np.concatenate([table, newline], axis=1).reshape(-1, *values.shape[1:])

    return TokenGrid(
        grid.size,
        grid.shape,
        widened(grid.row, -1),
        widened(grid.column, -1),
        widened(grid.boxes, np.nan),
    )


LAYOUTS: dict[str, Layout] = {"crop": cropped, "tiles": tiled, "blocks": merged}
