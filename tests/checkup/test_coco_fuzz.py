# SPDX-License-Identifier: Apache-2.0
"""COCO's codes, polygons and files, drawn at random, decoded in a process that may die of it.

In another answer to the same, pycocotools says what they are."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prereg_kernels.checkup.images.coco import CocoImages, decode
from prereg_kernels.checkup.images.reading import SkipImage
from tests.checkup.coco_codes import by_pycocotools, in_child, pack, pixels_of, runs, unpack
from tests.fuzzing import fuzz

REFUSED = ("ValueError", "TypeError", "KeyError")
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))

powers = st.builds(lambda k, d, s: s * (2**k + d), st.integers(29, 66), st.integers(-2, 2),
                   st.sampled_from((1, -1)))  # fmt: skip
junk = st.one_of(
    st.none(), st.booleans(), st.floats(), powers, st.text(max_size=3), st.just([]), st.just({})
)


@st.composite
def codes(draw: st.DrawFn) -> tuple[list[Any], tuple[int, int]]:
    """Counts that add up to their size, or do where integers have 64 bits, or do not."""
    size = draw(SIZES)
    pixels = size[0] * size[1]
    kind = draw(st.sampled_from(("fit", "wrap", "any")))
    small, large = st.integers(0, max(1, pixels // 4)), st.integers(2**61, 2**63 - 1)
    one = {"fit": small, "wrap": large | small, "any": small | large | powers}[kind]
    counts: list[Any] = draw(st.lists(one, max_size=6))
    rest = pixels - sum(counts)
    if kind == "wrap":  # in two parts that have no sign in 64 bits
        counts += [rest % 2**64 // 2, (rest % 2**64 + 1) // 2]
    elif kind == "fit" or draw(st.booleans()):
        counts.append(rest)
    if kind == "any" and draw(st.booleans()):
        counts.insert(draw(st.integers(0, len(counts))), draw(junk))
    return counts, size


@fuzz(100)
@given(codes())
def test_lists_of_counts(case: tuple[list[Any], tuple[int, int]]) -> None:
    counts, size = case
    failed, found = in_child(decode, {"size": list(size), "counts": counts}, size)
    try:
        expected = pixels_of(counts, size)
    except ValueError:
        assert failed == "ValueError"
    else:
        assert (found == expected).all()
        assert is_the_reference({"size": list(size), "counts": counts}, size)


@st.composite
def strings(draw: st.DrawFn) -> tuple[str, tuple[int, int]]:
    """Codes of such counts, and of regions, whole and damaged; and others."""
    counts, size = draw(codes())
    if draw(st.booleans()):
        picture = np.array(draw(st.lists(st.booleans(), min_size=81, max_size=81))).reshape(9, 9)
        counts = runs(picture[: size[0], : size[1]])
    text = pack([count for count in counts if type(count) is int])
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.text(st.characters(min_codepoint=45, max_codepoint=115), max_size=16))
        text = text[:at] + piece + text[at + draw(st.integers(0, 2)) :]
    return text, size


@fuzz(100)
@given(strings())
def test_strings_of_counts(case: tuple[str, tuple[int, int]]) -> None:
    text, size = case
    failed, found = in_child(decode, {"size": list(size), "counts": text}, size)
    try:
        expected = pixels_of(unpack(text), size)
    except ValueError:
        assert failed == "ValueError"
    else:
        assert (found == expected).all()


steps = st.integers(-16 * 4, 16 * 14).map(lambda n: n / 16) | st.integers(-20, 70).map(
    lambda n: n / 5  # where pycocotools rounds
)


@fuzz(100)
@given(st.lists(st.tuples(steps, steps), min_size=3, max_size=7), st.one_of(st.none(), junk), SIZES)
def test_polygons(points: list[tuple[float, float]], odd: Any, size: tuple[int, int]) -> None:
    polygon: list[Any] = [v for point in points for v in point]
    assert is_the_reference([polygon], size)
    polygon[1] = odd
    if type(odd) in (int, float) and abs(odd) < 2**18:  # the outline is twice as long
        assert is_the_reference([polygon], size)
    else:
        assert in_child(decode, [polygon], size)[0] == "ValueError"


def is_the_reference(segmentation: Any, size: tuple[int, int]) -> bool:
    """Whether we decode it, and as pycocotools does."""
    failed, found = in_child(decode, segmentation, size)
    expected = in_child(by_pycocotools, segmentation, size)[1]
    return not failed and bool((found == expected).all())


@fuzz(50)
@given(st.one_of(junk, st.lists(junk, max_size=3), st.dictionaries(st.sampled_from(
    ("size", "counts")), st.one_of(junk, st.lists(st.one_of(st.integers(0, 4), junk), max_size=3))
)))  # fmt: skip
def test_other_segmentations(segmentation: Any) -> None:
    failed, found = in_child(decode, segmentation, (2, 2))
    assert failed in REFUSED or found.shape == (2, 2)


CONTENT = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 5, "segmentation": [[0, 0, 3, 0, 3, 3]]},
        {"id": 2, "image_id": 1, "category_id": 6, "iscrowd": 0,
         "segmentation": {"size": [4, 5], "counts": [2, 8, 10]}},
        {"id": 3, "image_id": 2, "category_id": 6, "iscrowd": 1,
         "segmentation": {"size": [4, 5], "counts": pack([2, 8, 10])}},
    ],
}  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be exchanged."""
    below = node.items() if isinstance(node, dict) else enumerate(node)
    nested = [(*path, key) for key, _ in below]
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            nested += places(value, (*path, key))
    return nested


@fuzz(100)
@given(st.lists(st.tuples(st.sampled_from(places(CONTENT)), junk), max_size=2))
def test_files(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    content = copy.deepcopy(CONTENT)
    for path, value in changes:
        node: Any = content
        try:
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
        except (IndexError, KeyError, TypeError):  # in what was exchanged before
            continue
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in ("a.png", "b.png"):
            Image.new("RGB", (5, 4)).save(root / name)
        path = root / "x.json"
        path.write_text(json.dumps(content))
        failed, found = in_child(read_all, root, path)
    if failed:
        assert failed == "ValueError" and re.match(rf"{path}: .*expected ", found), (failed, found)


def read_all(root: Path, annotations: Path) -> int:
    """How many images could be read: the others were skipped."""
    images = CocoImages(root, annotations)
    read = 0
    for index in range(len(images)):
        try:
            sample = images[index]
        except SkipImage:
            continue
        assert sample.mask is not None and sample.mask.shape == (4, 5)
        assert set(np.unique(sample.mask)) - {-1} <= set(sample.object_labels["category"])
        read += 1
    return read
