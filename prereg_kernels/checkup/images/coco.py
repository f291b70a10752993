# SPDX-License-Identifier: Apache-2.0
"""Images with COCO's instance annotations: polygons and run-length codes become masks."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.mask import decode as decode_mask
from pycocotools.mask import frPyObjects

from prereg_kernels._util.files import content_digest, printable, read_json
from prereg_kernels.checkup.fingerprint import digest, of_files
from prereg_kernels.checkup.images.datasets import Sample
from prereg_kernels.checkup.images.reading import SkipImage, inside, read_image

_LIKE = "COCO annotations, a JSON object with images, annotations and categories"
_FAR = 1 << 28  # coordinates beyond are no pixels; pycocotools counts fifths of them in 32 bits
_LONGEST = 1 << 20  # px of an outline, of which pycocotools takes 80 bytes each
_LARGEST = 1 << 26  # pixels of an image; runs of more overflow the text that pycocotools writes

_Region = tuple[tuple[slice, slice], NDArray[np.bool_]]  # a window of the image, and what is in it

_NOWHERE: _Region = (slice(0), slice(0)), np.zeros((0, 0), dtype=np.bool_)

TARGET = "category"
"""What the object-level probe reads."""


class CocoImages:
    """The images of a COCO annotation file that have objects, in the order of their ids.

    An object is one annotation, its class the category's name. Later annotations cover earlier
    ones; crowds (`iscrowd`) are background.

    Args:
        root: directory of the images.
        annotations: the JSON file. Entries of the same file name are one image. One whose width
            and height are not the file's is skipped: polygons say nothing of their scale.

    Raises:
        ValueError: no such directory, or not such a file.
        OSError: it cannot be read.
    """

    def __init__(self, root: Path, annotations: Path) -> None:
        if not root.is_dir():
            raise ValueError(f"images: expected a directory, got {root}")
        self._root, self._annotations = root, annotations
        content = read_json(annotations, _LIKE)
        try:
            self._names = _named(content, "categories", "name")
            files = _named(content, "images", "file_name")
            self._sizes = {
                files[_id(entry, "id", where)]: (entry.get("height"), entry.get("width"))
                for where, entry in _listed(content, "images")
            }
            of_image: dict[int, list[Mapping[str, Any]]] = {}
            for where, annotation in _listed(content, "annotations"):
                image = _id(annotation, "image_id", where)
                of_image.setdefault(image, []).append(annotation)
        except ValueError as error:
            raise ValueError(f"{annotations}: {error}") from None
        of_file: dict[str, list[Mapping[str, Any]]] = {}
        for image in sorted(files):
            if image in of_image:
                of_file.setdefault(files[image], []).extend(of_image[image])
        self._items = list(of_file.items())
        if not self._items:
            raise ValueError(f"{annotations}: expected annotations of its images, got none")

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        """The file name of an image."""
        return printable(self._items[index][0])

    def label(self, index: int) -> None:
        """Its objects have classes, and it has none."""

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
        for said, got in zip(self._sizes[name], image.shape, strict=False):
            if said is not None and said != got:
                raise SkipImage("annotations of an image of another size")
        mask = np.full(image.shape[:2], -1, dtype=np.int64)
        labels: dict[int, str] = {}
        try:
            for number, annotation in enumerate(annotations):
                crowd = annotation.get("iscrowd")
                if crowd not in (None, 0, 1):
                    raise ValueError(f"iscrowd: expected 0 or 1, got {reprlib.repr(crowd)}")
                for window, region in _regions(annotation["segmentation"], image.shape[:2]):
                    mask[window][region] = -1 if crowd else number
                if not crowd:
                    labels[number] = self._names[_id(annotation, "category_id", "annotation")]
        except (KeyError, TypeError, ValueError):
            raise SkipImage("annotations that do not fit the image") from None
        return Sample(self.name(index), image, mask, {}, {TARGET: labels})


def _listed(content: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of one of the file's lists, each behind its place in it."""
    entries = content.get(kind)
    if not isinstance(entries, list):
        raise ValueError(f"expected {_LIKE}; got {reprlib.repr(entries)} for {kind}")
    for number, entry in enumerate(entries):
        where = f"{kind}[{number}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: expected an object, got {reprlib.repr(entry)}")
        yield where, entry


def _named(content: Mapping[str, Any], kind: str, field: str) -> dict[int, str]:
    """{id: name} of the categories or of the images."""
    names: dict[int, str] = {}
    for where, entry in _listed(content, kind):
        number, name = _id(entry, "id", where), entry.get(field)
        if type(name) not in (str, int) or name == "":
            raise ValueError(f"{where}.{field}: expected a name, got {reprlib.repr(name)}")
        if number in names:
            raise ValueError(f"{where}.id: expected another than {number}, which is taken")
        names[number] = str(name)
    return names


def _id(entry: Mapping[str, Any], field: str, where: str) -> int:
    """A whole number; as text, or with a point and zeros behind it, too."""
    value = entry.get(field)
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    raise ValueError(f"{where}.{field}: expected a whole number, got {reprlib.repr(value)}")


def decode(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The region of one annotation.

    Args:
        segmentation: polygons, a list of [x0, y0, x1, y1, ...] in px; or a run-length code,
            {"size": [height, width], "counts": a list, or COCO's compressed string}.
        size: (height, width) of the image.

    Returns:
        (H, W) bool: what pycocotools makes of it, the reference of COCO's evaluations. Polygons
            are united.

    Raises:
        ValueError: another size, counts that do not add up to it, or points that are none.
        KeyError, TypeError: another structure.
    """
    whole = np.zeros(size, dtype=bool)
    for window, region in _regions(segmentation, size):
        whole[window] |= region
    return whole


def _regions(segmentation: Any, size: tuple[int, int]) -> Iterator[_Region]:
    """The parts of one annotation, which may overlap.

    Everything is checked before pycocotools has it: its C code believes what it is given.
    """
    if size[0] * size[1] > _LARGEST:
        raise ValueError(f"size: expected at most {_LARGEST} pixels, got {list(size)}")
    if isinstance(segmentation, Mapping):
        yield _run_lengths(segmentation, size)
    elif isinstance(segmentation, str):
        raise TypeError("segmentation: expected polygons or a run-length code, got text")
    else:
        for polygon in segmentation:
            yield _polygon(polygon, size)


def _polygon(polygon: Any, size: tuple[int, int]) -> _Region:
    """The pixels of a polygon, and a window of the image that holds them.

    pycocotools walks the outline in steps of a fifth of a pixel. It checks neither what an integer
    holds nor how much memory the steps take.
    """
    if not isinstance(polygon, list | tuple) or len(polygon) % 2 or len(polygon) < 6:
        raise ValueError(f"segmentation: expected 3 points or more, got {reprlib.repr(polygon)}")
    if not all(type(v) in (int, float) and abs(v) < _FAR for v in polygon):  # false of NaN
        raise ValueError(f"segmentation: expected pixels, got {reprlib.repr(polygon)}")
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    outline = np.abs(points - np.roll(points, -1, axis=0)).max(axis=1).sum()
    if outline + len(points) > _LONGEST:
        raise ValueError(f"segmentation: expected an outline of {_LONGEST} px at most")
    width, height = np.clip(np.ceil(points.max(axis=0)), 0, size[::-1]).astype(int).tolist()
    if not width or not height:
        return _NOWHERE
    # nothing of it is right of these columns or below these rows
    code = frPyObjects([list(polygon)], height, width)[0]
    return _decoded(_unpack(code["counts"]), (height, width))


def _run_lengths(code: Mapping[str, Any], size: tuple[int, int]) -> _Region:
    """Runs of background and object in turn, down the columns."""
    given = code["size"]
    if not isinstance(given, list | tuple) or [*map(type, given)] != [int, int]:
        raise ValueError(f"size: expected [height, width], got {reprlib.repr(given)}")
    if tuple(given) != size:
        raise ValueError(f"size: expected {list(size)}, the image's, got {given}")
    counts = code["counts"]
    runs = _unpack(counts) if isinstance(counts, (str, bytes)) else counts
    _check_runs(runs, size[0] * size[1])
    return _decoded(runs, size)


def _decoded(runs: Sequence[int], size: tuple[int, int]) -> _Region:
    """The region of runs that were checked, and the columns that hold it."""
    if len(runs) < 2:
        return _NOWHERE
    height, inner = size[0], list(runs)
    left, inner[0] = divmod(runs[0], height)
    behind = 0
    if len(runs) % 2:
        behind, inner[-1] = divmod(runs[-1], height)
    width = size[1] - left - behind
    if not width:
        return _NOWHERE
    code = frPyObjects({"size": [height, width], "counts": inner}, height, width)
    return (slice(height), slice(left, left + width)), decode_mask(code).view(np.bool_)


def _check_runs(runs: Any, pixels: int) -> None:
    """Raise ValueError unless the runs are whole numbers of so many pixels in all.

    In Python's integers: sums of int64 wrap, and decoders that believe one write past a buffer.
    """
    if not isinstance(runs, list | tuple) or not {*map(type, runs)} <= {int}:
        raise ValueError(f"counts: expected whole numbers, got {reprlib.repr(runs)}")
    if min(runs, default=0) < 0 or sum(runs) != pixels:  # so none is larger than that
        raise ValueError(
            f"counts: expected runs of {pixels} pixels in all, none negative, got "
            f"{reprlib.repr(runs)}"
        )


def _unpack(text: str | bytes) -> list[int]:
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
            if shift > 60:  # no image has so many pixels; a longer one takes quadratic time
                raise ValueError("counts: expected numbers of 13 characters at most")
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts: expected whole numbers, the last is cut short")
    return runs
