"""Images with COCO's instance annotations: polygons and run-length codes become masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from prereg_kernels.diagnostics.datasets import Sample
from prereg_kernels.diagnostics.fingerprint import digest, of_files
from prereg_kernels.diagnostics.images import SkipImage, inside, read_image
from prereg_kernels.files import content_digest

_FINE = 5  # Pillow fills the outline's pixels too: draw this many times larger, look at centres

TARGET = "category"
"""What the object-level probe reads."""


class CocoImages:
    """The images of a COCO annotation file that have objects, in the order of their ids.

    An object is one annotation, its class the category's name. Later annotations cover earlier
    ones; crowds (`iscrowd`) are background.

    Args:
        root: directory of the images.
        annotations: the JSON file.

    Raises:
        ValueError: not such a file.
        OSError: it cannot be read.
    """

    def __init__(self, root: Path, annotations: Path) -> None:
        self._root, self._annotations = root, annotations
        try:
            with annotations.open(encoding="utf-8") as file:
                content = json.load(file)
            self._names = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            of_image: dict[int, list[Mapping[str, Any]]] = {}
            for annotation in content["annotations"]:
                of_image.setdefault(int(annotation["image_id"]), []).append(annotation)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{annotations}: expected COCO annotations, a JSON object with images, annotations "
                f"and categories; got {type(error).__name__}: {error}"
            ) from None
        self._items = [(files[i], of_image[i]) for i in sorted(files) if i in of_image]
        if not self._items:
            raise ValueError(f"{annotations}: expected annotations of its images, got none")

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        """The file name of an image."""
        return self._items[index][0]

    def fingerprint(self, indices: Sequence[int]) -> dict[str, str]:
        """Of the images' names and files, and of the annotations."""
        names = [self._items[i][0] for i in indices]
        return {
            "images": digest(names, of_files(map(self._path, names))),
            "annotations": content_digest([self._annotations]),
        }

    def _path(self, name: str) -> Path | None:
        try:
            return inside(self._root, name)
        except SkipImage:
            return None

    def __getitem__(self, index: int) -> Sample:
        """One image. Raises SkipImage where it, or its annotations, cannot be used."""
        name, annotations = self._items[index]
        image = read_image(inside(self._root, name))
        mask = np.full(image.shape[:2], -1, dtype=np.int64)
        labels: dict[int, str] = {}
        try:
            for number, annotation in enumerate(annotations):
                region = decode(annotation["segmentation"], image.shape[:2])
                if annotation.get("iscrowd"):
                    mask[region] = -1
                    continue
                mask[region] = number
                labels[number] = self._names[int(annotation["category_id"])]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise SkipImage("annotations that do not fit the image") from None
        return Sample(name, image, mask, {}, {TARGET: labels})


def decode(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The region of one annotation.

    Args:
        segmentation: polygons, a list of [x0, y0, x1, y1, ...] in px; or a run-length code,
            {"size": [height, width], "counts": a list, or COCO's compressed string}.
        size: (height, width) of the image.

    Returns:
        (H, W) bool; of polygons, the pixels whose centres are inside.

    Raises:
        ValueError: another size, or counts that do not add up to it.
        KeyError, TypeError: another structure.
    """
    if isinstance(segmentation, Mapping):
        return _run_lengths(segmentation, size)
    canvas = Image.new("1", (_FINE * size[1], _FINE * size[0]))
    draw = ImageDraw.Draw(canvas)
    for polygon in segmentation:
        if len(polygon) % 2 or len(polygon) < 6:
            raise ValueError(f"segmentation: expected 3 points or more, got {len(polygon) / 2:g}")
        # COCO's coordinates are of the pixels' edges, Pillow's of their centres
        draw.polygon([_FINE * float(v) - 0.5 for v in polygon], fill=1)
    return np.asarray(canvas)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE]


def _run_lengths(code: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Runs of background and object in turn, down the columns."""
    if tuple(code["size"]) != size:
        raise ValueError(f"size: expected {list(size)}, the image's, got {code['size']}")
    counts = code["counts"]
    runs = _unpack(counts) if isinstance(counts, (str, bytes)) else counts
    lengths = np.asarray(runs, dtype=np.int64)
    if lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != size[0] * size[1]:
        raise ValueError(f"counts: expected runs of {size[0] * size[1]} pixels in all")
    inside_object = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside_object, lengths).reshape(size[1], size[0]).T


def _unpack(text: str | bytes) -> Sequence[int]:
    """COCO's compressed counts: five bits a character, lowest first, the sixth says that more
    follow; from the fourth run on, the difference to the run two before."""
    data = text.encode("ascii") if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for byte in data:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError(f"counts: expected characters from '0' to 'o', got {chr(byte)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts: expected whole numbers, the last is cut short")
    return runs
