# SPDX-License-Identifier: Apache-2.0
"""The demo's scenes as batches of the checkup: exact masks, and classes of every object."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from prereg_kernels.checkup.batches import Batch, ImageFacts
from prereg_kernels.checkup.images.patches import regular_grid
from prereg_kernels.demo.data.packing import pixel_values
from prereg_kernels.demo.data.scenes import ATTRIBUTES, PROPERTIES, Scene, Scenes


class SceneBatches:
    """The first `count` scenes of a set, for a model that was trained on such scenes.

    A sequence holds an image and no question; the pixels are exactly those of training.

    Raises:
        ValueError: the model is no LLaVA, or its tower takes images of another size, or of other
            patches.
    """

    def __init__(self, model: nn.Module, scenes: Scenes, count: int, size: int = 64) -> None:
        if not isinstance(model, LlavaForConditionalGeneration):
            raise ValueError(
                f"scenes: need a LLaVA of this package's training, got {type(model).__name__}"
            )
        vision, config = model.config.vision_config, scenes.config
        wanted = (config.image_size, config.patch_size)
        if (vision.image_size, vision.patch_size) != wanted:
            raise ValueError(
                f"scenes: have {wanted[0]} px images and {wanted[1]} px patches, but the model's "
                f"tower takes {vision.image_size} and {vision.patch_size}"
            )
        self._image_token = model.config.image_token_id
        self._scenes, self._count, self._size = scenes, count, size

    def __len__(self) -> int:
        return -(-self._count // self._size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = index * self._size
        numbers = range(first, min(first + self._size, self._count))
        batch = self._scenes.batch(numbers)
        tokens = self._scenes.config.patches
        inputs = {
            "input_ids": torch.full((len(batch), tokens), self._image_token),
            "pixel_values": pixel_values(batch.images),
        }
        named = zip(numbers, batch.scenes, strict=True)
        return Batch(inputs, tuple(self._facts(number, scene) for number, scene in named))

    def _facts(self, number: int, scene: Scene) -> ImageFacts:
        config = self._scenes.config
        size = (config.image_size, config.image_size)
        side = config.image_size // config.patch_size
        labels = {
            name: {
                slot: _word(name, getattr(thing, name)) for slot, thing in enumerate(scene.objects)
            }
            for name in PROPERTIES
        }
        grey = np.round(255 * scene.image).astype(np.uint8)
        return ImageFacts(
            f"{self._scenes.split} scene {number}",
            regular_grid(size, (side, side), resized=size),
            scene.patch_objects,
            {},
            labels,
            np.repeat(grey[:, :, None], 3, axis=2),
        )


def _word(name: str, value: int) -> str:
    return str(value) if name == "digit" else ATTRIBUTES[name][value]
