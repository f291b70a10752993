# SPDX-License-Identifier: Apache-2.0
"""The checkup of my images ended in a MemoryError: one of them is a strip, one pixel wide.

LLaVA's processors resize by the shorter edge, or pad to a square, before they crop. A strip of a
few hundred bytes becomes gigabytes, and an error of the processor other than ValueError ended the
run. An image is judged by the size that the processor would make. Whatever a processor says of one
image is a reason to skip it, counted and shown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from PIL import Image

from prereg_kernels.checkup import checkup
from prereg_kernels.checkup.images.datasets import ImageFolder
from prereg_kernels.checkup.images.image_batches import ImageBatches
from tests.checkup.pictures import QWEN_PROCESSOR, make_loaded, save_folder

CROP = {"height": 16, "width": 16}
PROCESSORS: dict[str, tuple[str, Callable[[], Any]]] = {
    "CLIP": (
        "llava",
        lambda: hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=CROP),
    ),
    "padding": (
        "llava",
        lambda: hf.LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size=CROP, do_pad=True),
    ),
    "Qwen": ("qwen2_5_vl", lambda: hf.Qwen2VLImageProcessorPil(**QWEN_PROCESSOR)),
}


class _Watched:
    """A processor, and the sizes of images that it was given."""

    def __init__(self, processor: Any, error: type[Exception] | None = None) -> None:
        self._processor, self._error, self.sizes = processor, error, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: list[np.ndarray], **rest: Any) -> Any:
        self.sizes.append(images[0].shape[:2])
        if self._error is not None and images[0].shape[:2] == (20, 20):
            raise self._error("of this image")
        return self._processor(images, **rest)


@pytest.mark.parametrize("name", PROCESSORS)
def test_strips_are_skipped_before_they_are_resized(tmp_path: Path, name: str) -> None:
    family, make = PROCESSORS[name]
    save_folder(tmp_path, 4)
    strips = {"a.png": (1, 400_000), "b.png": (400_000, 1)}
    for file, size in strips.items():
        Image.new("1", size).save(tmp_path / "images" / file)
        assert (tmp_path / "images" / file).stat().st_size < 10_000
    processor = _Watched(make())
    loaded = make_loaded(family, processor)
    batches = ImageBatches(loaded, ImageFolder(tmp_path / "images"), size=6)
    found = checkup(loaded.model, batches, tmp_path / "out", splits=2)
    assert len(found.measured.names) == 4
    ((reason, names),) = found.measured.skipped.items()
    assert names == sorted(strips)
    if name == "Qwen":
        assert reason.startswith("refused by the image processor: absolute aspect ratio")
    else:
        assert reason == "the image processor would make more than 89,478,485 pixels of it"
        assert set(processor.sizes) == {(32, 40)}


@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError, RuntimeError, KeyError])
def test_whatever_a_processor_says_of_one_image(tmp_path: Path, error: type[Exception]) -> None:
    save_folder(tmp_path, 4)
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    processor = _Watched(
        hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=CROP), error
    )
    loaded = make_loaded("llava", processor)
    found = checkup(
        loaded.model, ImageBatches(loaded, ImageFolder(tmp_path / "images")), tmp_path / "out"
    )
    ((reason, names),) = found.measured.skipped.items()
    assert names == ["a.png"] and len(found.measured.names) == 4
    assert reason.startswith(f"refused by the image processor: {error.__name__}: ")


def test_a_processor_that_takes_none_says_why(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_text("no")
    loaded = make_loaded("llava", _Watched(hf.CLIPImageProcessorPil(), MemoryError))
    with pytest.raises(ValueError, match=r"got none: 1 refused by the image .*; 1 damaged"):
        checkup(
            loaded.model, ImageBatches(loaded, ImageFolder(tmp_path / "images")), tmp_path / "out"
        )
