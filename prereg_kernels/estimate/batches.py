# SPDX-License-Identifier: Apache-2.0
"""A batch of one image and a few words, for a model of which there is only a config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from prereg_kernels.attach.family import Family
from prereg_kernels.estimate.trace import tracing

GRIDS = ((64, 72), (16, 24))  # patches of an image, rows and columns; windows of 8 fit
SIDE = 336  # pixels, where the config does not say
WORDS = 8


def made_up_batches(model: nn.Module, family: Family) -> list[dict[str, Any]]:
    """Of an image of the usual size; and of another, where images are read at their own.

    Args:
        model: on the meta device.

    Raises:
        ValueError: it needs more than ids and pixels.
    """
    reason: Exception | None = None
    for with_sizes in (False, True):  # some models take them of one of their towers alone
        try:
            grids = GRIDS if "image_grid_thw" in _names(model) else (None,)
            return [_batch(model, family, _pixels(model, grid, with_sizes)) for grid in grids]
        except Exception as error:
            reason = reason or error
    raise ValueError(
        f"model: {type(model).__name__} needs more than ids and pixels "
        f"({' '.join(str(reason).split())[:160]}); expected a directory with its processor"
    ) from reason


def _names(model: nn.Module) -> Any:
    return inspect.signature(model.forward).parameters


def _pixels(model: Any, grid: tuple[int, int] | None, with_sizes: bool) -> dict[str, Any]:
    vision = model.config.vision_config
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    if grid is not None:
        depth = getattr(vision, "temporal_patch_size", 1)
        pixels = torch.zeros(grid[0] * grid[1], channels * depth * vision.patch_size**2)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *grid]])}
    size = getattr(vision, "image_size", None) or SIDE
    side = size[0] if isinstance(size, (list, tuple)) else size
    inputs: dict[str, Any] = {"pixel_values": torch.ones(1, channels, side, side)}
    if with_sizes:
        inputs["image_sizes"] = torch.tensor([[side, side]])
    return inputs


def _batch(model: Any, family: Family, inputs: dict[str, Any]) -> dict[str, Any]:
    token = family.visual_token_ids(model)[0]
    count = _features(model, inputs)
    words = [word for word in range(3, 3 + 4 * WORDS) if word != token][: WORDS + 1]
    ids = torch.tensor([[words[0], *[token] * count, *words[1:]]])
    is_image = ids == token
    names = _names(model)
    if "mm_token_type_ids" in names:
        inputs = inputs | {"mm_token_type_ids": is_image.int()}
    if "token_type_ids" in names:
        inputs = inputs | {"token_type_ids": is_image.int()}
    labels = ids.masked_fill(is_image, -100)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **inputs}


def _features(model: Any, inputs: dict[str, Any]) -> int:
    """How many visual tokens the model makes of them."""
    with tracing(model), torch.no_grad():
        found = model.get_image_features(**inputs)
    found = getattr(found, "pooler_output", found)
    rows = found if isinstance(found, (list, tuple)) else [found]
    return sum(x.numel() // x.shape[-1] for x in rows)
