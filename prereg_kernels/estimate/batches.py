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
ANY_SIZE = "pixtral"  # the encoder of Mistral 3, which takes images of any size, up to the config's
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
            images = _images(model, with_sizes)
            return [_batch(model, family, inputs) for inputs in images]
        except Exception as error:
            reason = reason or error
    raise ValueError(
        f"model: {type(model).__name__} needs more than ids and pixels "
        f"({' '.join(str(reason).split())[:160]}); expected a directory with its processor"
    ) from reason


def _names(model: nn.Module) -> Any:
    return inspect.signature(model.forward).parameters


def _images(model: Any, with_sizes: bool) -> list[dict[str, Any]]:
    """The arguments of an image's size each."""
    vision = model.config.vision_config
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    if "image_grid_thw" in _names(model):
        row = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        return [
            {
                "pixel_values": torch.zeros(grid[0] * grid[1], row),
                "image_grid_thw": torch.tensor([[1, *grid]]),
            }
            for grid in GRIDS
        ]
    size = getattr(vision, "image_size", None) or SIDE
    sides = [size[0] if isinstance(size, (list, tuple)) else size]
    if vision.model_type == ANY_SIZE:
        unit = vision.patch_size * getattr(model.config, "spatial_merge_size", 1)
        sides.append(max(sides[0] // 4 // unit, 2) * unit)
    return [
        {"pixel_values": torch.ones(1, channels, side, side)}
        | ({"image_sizes": torch.tensor([[side, side]])} if with_sizes else {})
        for side in sides
    ]


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
