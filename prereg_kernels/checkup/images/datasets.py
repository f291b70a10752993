# SPDX-License-Identifier: Apache-2.0
"""Image sets on disk: a folder, perhaps one folder a class, with masks and labels beside it."""

from __future__ import annotations

import csv
import os
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prereg_kernels._util.files import printable, read_json
from prereg_kernels.checkup.fingerprint import digest, of_files
from prereg_kernels.checkup.images.patches import check_mask
from prereg_kernels.checkup.images.reading import (
    IMAGE_SUFFIXES,
    SkipImage,
    inside,
    read_image,
    read_mask,
)

MASKS_ARE = ("instances", "classes")
BACKGROUND = (0, 255)
_LINE = 1 << 18  # characters of a CSV line that are read at a time
TARGET = "class"
"""What the image-level probe reads, and the object-level one where masks hold classes."""


@dataclass(frozen=True)
class Sample:
    """One image, and what is known of it.

    Attributes:
        name: for people, unique in its set.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) object ids at any resolution of the whole image, negative = background; None
            where there is none.
        labels: {target: the image's class}.
        object_labels: {target: {object id: its class}}.
    """

    name: str
    image: NDArray[np.uint8]
    mask: NDArray[np.int64] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    object_labels: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


class Samples(Protocol):
    """A set of samples: what the checkup reads."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Its name, without reading the image."""

    def label(self, index: int) -> str | None:
        """Its class, without reading the image; None where that is not known."""

    def fingerprint(self, indices: Sequence[int]) -> dict[str, str]:
        """{what: text} of those samples; a text changes when what they would give does."""

    def __getitem__(self, index: int) -> Sample:
        """One sample. Raises SkipImage where it cannot be used."""


class ImageFolder:
    """The images below a directory, sorted by path.

    Args:
        root: the directory. Where every image lies in a subdirectory, its first part is its class.
        labels: a file with classes instead: CSV lines `name,class`, or a JSON object. Names are
            paths below `root`, or file names.
        masks: a directory with a PNG file of numbers for each image, at the same path, of any
            resolution.
        masks_are: "instances": a number tells objects of one image apart and means nothing else.
            "classes" (as in COCO-Stuff): a number is a class, and each class of an image an object.
        background: numbers that are no object.
        without: a directory below `root` whose images are left out, as are those of directories
            whose names begin with a dot.

    Raises:
        ValueError: no images, labels of none of them, no masks, a labels file that is none, or a
            link to a directory elsewhere, which is not followed.
        OSError: a directory or file cannot be read.
    """

    def __init__(
        self,
        root: Path,
        *,
        labels: Path | None = None,
        masks: Path | None = None,
        masks_are: str = "instances",
        background: Collection[int] = BACKGROUND,
        without: Path | None = None,
    ) -> None:
        if masks_are not in MASKS_ARE:
            raise ValueError(f"masks_are: expected one of {MASKS_ARE}, got {masks_are!r}")
        if not root.is_dir():
            raise ValueError(f"images: expected a directory, got {root}")
        if masks is not None and not masks.is_dir():
            raise ValueError(f"masks: expected a directory or COCO's JSON file, got {masks}")
        self._root, self._masks = root, masks
        self._masks_are, self._background = masks_are, tuple(background)
        self._files = sorted(_image_files(root, without))
        if not self._files:
            raise ValueError(f"images: expected image files below {root}, got none")
        if masks is not None and not any(self._mask_path(file).exists() for file in self._files):
            example = printable(self._mask_path(self._files[0]))
            raise ValueError(f"masks: expected a file such as {example} for each image, got none")
        self._labels = self._classes(labels)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The path of an image below the directory."""
        return printable(self._files[index].as_posix())

    def label(self, index: int) -> str | None:
        """The class of an image."""
        return self._labels.get(self._files[index].as_posix())

    def fingerprint(self, indices: Sequence[int]) -> dict[str, str]:
        """Of the images' names and files, and of their labels and masks."""
        files = [self._files[i] for i in indices]
        names = [file.as_posix() for file in files]
        masks = [self._mask_path(file) for file in files] if self._masks else []
        return {
            "images": digest(names, of_files(self._root / file for file in files)),
            "masks": digest(self._masks_are, self._background, of_files(masks)),
            "labels": digest([self._labels.get(name) for name in names]),
        }

    def __getitem__(self, index: int) -> Sample:
        """One image. Raises SkipImage where it, or its mask, cannot be used."""
        file = self._files[index]
        image = read_image(inside(self._root, str(file)))
        label = self.label(index)
        labels = {} if label is None else {TARGET: label}
        if self._masks is None:
            return Sample(self.name(index), image, None, labels)
        try:
            mask = read_mask(inside(self._masks, str(file.with_suffix(".png"))))
            check_mask(mask, image.shape[:2])
        except SkipImage as reason:
            raise SkipImage(f"mask: {reason}") from None
        except ValueError:
            raise SkipImage("mask: not of the image's proportions") from None
        mask = np.where(np.isin(mask, self._background), -1, mask)
        classes: dict[str, dict[int, str]] = {}
        if self._masks_are == "classes":
            classes[TARGET] = {int(value): str(value) for value in np.unique(mask) if value >= 0}
        return Sample(self.name(index), image, mask, labels, classes)

    def _mask_path(self, file: Path) -> Path:
        assert self._masks is not None
        return self._masks / file.with_suffix(".png")

    def _classes(self, labels: Path | None) -> dict[str, str]:
        names = [file.as_posix() for file in self._files]
        if labels is None:
            if all(len(file.parts) > 1 for file in self._files):
                return {name: printable(name.split("/")[0]) for name in names}
            return {}
        given = read_labels(labels)
        classes = {
            name: given[key]
            for name in names
            if (key := name if name in given else name.rsplit("/", 1)[-1]) in given
        }
        if not classes:
            raise ValueError(
                f"{labels}: expected labels of images such as {printable(names[0])}, got labels of "
                f"{len(given)} others, such as {printable(next(iter(given)))}"
            )
        return classes


def _image_files(root: Path, without: Path | None) -> Iterator[Path]:
    """Images below it; links that lead nowhere too, so that they are counted as skipped."""
    for directory, inner, names in os.walk(root):
        below = Path(directory).relative_to(root)
        inner[:] = [name for name in inner if _is_walked(root, Path(directory, name), without)]
        for name in names:
            path = os.path.join(directory, name)
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and (
                os.path.isfile(path) or not os.path.exists(path)
            ):
                yield below / name


def _is_walked(root: Path, directory: Path, without: Path | None) -> bool:
    """Whether images are looked for in it. No link is followed: one within has them elsewhere."""
    if directory.name.startswith("."):
        return False
    if directory.is_symlink() and not directory.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"images: expected directories, got the link {printable(directory)}, which leads out "
            "of them and is not followed; put the images in its place, or take it away"
        )
    return without is None or directory.resolve() != without.resolve()


def read_labels(path: Path) -> dict[str, str]:
    """{image: class} of a CSV file with lines `name,class`, or of a JSON object.

    Raises:
        ValueError: neither, or two classes of one image.
        OSError: it cannot be read.
    """
    if path.suffix == ".json":
        like = 'an object such as {"a.jpg": "cat"}'
        table = read_json(path, like, _one_class_each)
        for label in table.values():
            if not isinstance(label, (str, int)):
                raise ValueError(f"{path}: expected {like}; got the class {reprlib.repr(label)}")
    else:
        table = _read_pairs(path)
    if not table:
        raise ValueError(f"{path}: expected labels, got none")
    return {name: printable(label) for name, label in table.items()}


def _read_pairs(path: Path) -> dict[str, str]:
    """{name: class} of CSV lines."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        # what is longer has a field that the reader refuses
        lines = csv.reader(iter(partial(file.readline, _LINE), ""), strict=True)
        try:
            return _one_class_each(_pair(row) for row in lines if row)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text: {error}") from None
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}:{lines.line_num}: {error}") from None


def _pair(row: Sequence[str]) -> tuple[str, str]:
    if len(row) != 2:
        raise ValueError(f"expected name,class, got {len(row)} fields")
    name, label = (text.strip() for text in row)
    if not label:
        raise ValueError(f"expected a class of {printable(name)[:60]}, got none")
    return name, label


def _one_class_each(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, label in pairs:
        if name in table and table[name] != label:
            both = " and ".join(printable(given)[:60] for given in (table[name], label))
            raise ValueError(f"expected one class of {printable(name)[:60]}, got {both}")
        table[name] = label
    return table


class Subset:
    """The first `count` of a set in an order drawn with `seed`: a fair sample of sorted classes.

    Where that would leave few images of each class, it has fewer classes, with EACH images of each
    where there are so many: no probe can tell a class that it has not seen.
    """

    EACH = 8

    def __init__(self, samples: Samples, count: int, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"limit: expected at least 1, got {count}")
        order: list[int] = np.random.default_rng(seed).permutation(len(samples)).tolist()
        of_class: dict[str, list[int]] = {}
        for i in order:
            if (label := samples.label(i)) is not None:
                of_class.setdefault(label, []).append(i)
        kept: list[list[int]] = []
        for of_one in of_class.values():
            if len(kept) > 1 and sum(map(len, kept)) >= count:
                break
            kept.append(of_one[: self.EACH])
        if len(kept) < len(of_class):
            rank = {i: rank for of_one in kept for rank, i in enumerate(of_one)}
            order = sorted((i for i in order if i in rank), key=rank.__getitem__)
        self._samples, self._order = samples, order[:count]

    def __len__(self) -> int:
        return len(self._order)

    def name(self, index: int) -> str:
        """As the whole set has it."""
        return self._samples.name(self._order[index])

    def label(self, index: int) -> str | None:
        """As the whole set has it."""
        return self._samples.label(self._order[index])

    def fingerprint(self, indices: Sequence[int]) -> dict[str, str]:
        """As the whole set has it."""
        return self._samples.fingerprint([self._order[i] for i in indices])

    def __getitem__(self, index: int) -> Sample:
        return self._samples[self._order[index]]
