# SPDX-License-Identifier: Apache-2.0
"""One image through a model's image processor, and where its tokens are then."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prereg_kernels.checkup.images.layouts import family_with_layout, layout_of, pixels_made
from prereg_kernels.checkup.images.patches import TokenGrid
from prereg_kernels.checkup.images.reading import SkipImage
from prereg_kernels.checkup.model_files import in_words


def pillow_class(name: str) -> type[Any] | None:
    """transformers' image processor of that name that runs on Pillow, whatever is installed.

    Args:
        name: an `image_processor_type`, such as "CLIPImageProcessor" or "CLIPImageProcessorFast".
    """
    import transformers

    plain = name.removesuffix("Fast")
    # Before 5 the plain name is that of the one on Pillow
    suffix = "Pil" if hasattr(transformers, "CLIPImageProcessorPil") else ""
    found: type[Any] | None = getattr(transformers, f"{plain}{suffix}", None)
    return found if plain.endswith("ImageProcessor") else None


def make(kind: type[Any], settings: Mapping[str, Any]) -> Any:
    """An image processor of that class with the settings of a file.

    Qwen2VLImageProcessor of transformers 4.57 ignores `size`, but for the two numbers in it.
    """
    names, edges = ("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge")
    size, known = settings.get("size"), signature(kind).parameters
    own: dict[str, Any] = {}
    if isinstance(size, dict) and set(names) <= set(known) and set(edges) <= set(size):
        bounds = {name: size[edge] for name, edge in zip(names, edges, strict=True)}
        own = {name: x for name, x in bounds.items() if settings.get(name) is None}
    return kind(**{**settings, **own})


def process(processor: Any, image: NDArray[np.uint8]) -> Mapping[str, Tensor]:
    """What the processor makes of one (H, W, 3) image, as tensors."""
    from transformers.image_utils import ChannelDimension

    # Said, not guessed: an image of three rows looks like one of three channels.
    return dict(processor([image], return_tensors="pt", input_data_format=ChannelDimension.LAST))


def place(
    config: Any, processor: Any, image: NDArray[np.uint8]
) -> tuple[TokenGrid, Mapping[str, Tensor]]:
    """Where the tokens of one (H, W, 3) image are, and what the processor makes of it, as tensors.

    Raises:
        SkipImage: the processor does not take it, or would make too much of it.
    """
    size = image.shape[0], image.shape[1]
    most = Image.MAX_IMAGE_PIXELS
    family = family_with_layout(config.model_type)
    try:
        if most is not None and pixels_made(family, processor, size) > most:
            raise SkipImage(f"the image processor would make more than {most:,} pixels of it")
        made = process(processor, image)
        return layout_of(family)(config, processor, size, made), made
    except SkipImage:
        raise
    except Exception as error:  # Qwen's limit on proportions, no memory, whatever a processor says
        reason = in_words(error).split(",")[0][:80]
        raise SkipImage(f"refused by the image processor: {reason}") from error
