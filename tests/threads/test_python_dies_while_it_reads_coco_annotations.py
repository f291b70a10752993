# SPDX-License-Identifier: Apache-2.0
"""Python dies of a segmentation fault while it reads my COCO annotations.

The lengths of a run-length code were summed in 64 bits. A sum that wraps to the image's size made
the decoder write past its buffer. Lengths are checked as Python's integers. The image is skipped
and counted, and the run goes on with the others.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from prereg_kernels.checkup.images.coco import CocoImages
from prereg_kernels.checkup.images.reading import SkipImage
from tests.checkup.coco_codes import in_child


def read(root: Path) -> list[list[list[int]] | str]:
    """Each image's mask, or the reason why it is skipped."""
    found: list[list[list[int]] | str] = []
    images = CocoImages(root, root / "annotations.json")
    for index in range(len(images)):
        try:
            mask = images[index].mask
            assert mask is not None
            found.append(mask.tolist())
        except SkipImage as reason:
            found.append(str(reason))
    return found


def test_the_other_images_are_read(tmp_path: Path) -> None:
    broken = {"size": [2, 3], "counts": [2**62, 2**62, 2**62, 2**62, 6]}
    annotations = []
    for image, code in ((1, broken), (2, {"size": [2, 3], "counts": [1, 2, 3]})):
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / f"{image}.png")
        annotations.append({"image_id": image, "category_id": 1, "segmentation": code})
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": annotations,
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    assert in_child(read, tmp_path) == (
        "",
        ["annotations that do not fit the image", [[-1, 0, -1], [0, -1, -1]]],
    )
