# SPDX-License-Identifier: Apache-2.0
"""COCO's annotations: codes written by an encoder of this file, and by COCO's own library."""

from __future__ import annotations

import itertools
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from prereg_kernels.checkup.images.coco import CocoImages, decode
from prereg_kernels.checkup.images.reading import SkipImage
from tests.checkup.coco_codes import by_pycocotools, in_child, pack, runs
from tests.checkup.pictures import noise


def region(seed: int, height: int = 37, width: int = 53) -> NDArray[np.bool_]:
    """Blobs, so that runs are long and short."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((5, 7)) < 0.5
    image = Image.fromarray(coarse).resize((width, height))
    return np.asarray(image) ^ (rng.random((height, width)) < 0.01)


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths(seed: int) -> None:
    mask = region(seed)
    size = list(mask.shape)
    counts = runs(mask)
    for code in (counts, pack(counts), pack(counts).encode()):
        assert (decode({"size": size, "counts": code}, mask.shape) == mask).all()


def test_a_string_of_cocos_own_library() -> None:
    # pycocotools 2.0.11: encode(np.asfortranarray(mask)) of the mask below
    mask = np.zeros((40, 40), dtype=bool)
    mask[5:35, 8:30] = True
    mask[12:20, 12:16] = False
    code = {"size": [40, 40], "counts": "U:n0:000000YON82HN82HN82HN82?00000000000000000000000000[<"}
    assert (decode(code, (40, 40)) == mask).all()


def test_polygons() -> None:
    # COCO's coordinates are of edges: 2 to 6 are the pixels 2, 3, 4 and 5
    square = decode([[2, 1, 6, 1, 6, 4, 2, 4]], (8, 10))
    expected = np.zeros((8, 10), dtype=bool)
    expected[1:4, 2:6] = True
    assert (square == expected).all()
    two = decode([[0, 0, 3, 0, 3, 3, 0, 3], [6, 4, 9, 4, 9, 7, 6, 7]], (8, 10))
    assert two[1, 1] and two[5, 7] and not two[1, 7] and not two[4, 4]


@pytest.mark.parametrize(
    ("segmentation", "error"),
    [
        ({"size": [4, 4], "counts": [3, 2]}, ValueError),
        ({"size": [4, 4], "counts": [20, -4]}, ValueError),
        ({"size": [4, 5], "counts": [20]}, ValueError),
        ({"size": [4, 4], "counts": "~~"}, ValueError),
        ({"size": [4, 4], "counts": "P"}, ValueError),  # says that more follows
        ({"size": [4, 4], "counts": [10**30]}, ValueError),
        ({"counts": [16]}, KeyError),
        ([[0, 0, 1, 1]], ValueError),
        ([["a"] * 6], ValueError),
        (None, TypeError),
        ({"size": [4, 4], "counts": [1.0, 15.0]}, ValueError),
        ({"size": [4, 4], "counts": [True, 15]}, ValueError),
        ({"size": [4, 4], "counts": ["1", "15"]}, ValueError),
        ({"size": [4, 4], "counts": [[8], [8]]}, ValueError),
        ({"size": [4, 4], "counts": {"1": 15}}, ValueError),
        ({"size": [4, 4], "counts": 16}, ValueError),
        ({"size": [4, 4], "counts": []}, ValueError),
        ({"size": [4.0, 4], "counts": [16]}, ValueError),
        ({"size": [4, 4, 1], "counts": [16]}, ValueError),
        ({"size": "44", "counts": [16]}, ValueError),
        ({"size": 16, "counts": [16]}, ValueError),
        ([[0, 0, 1, 1, 2]], ValueError),
        ([[0, 0, 4, 0, 4, float("nan")]], ValueError),
        ([[0, 0, 4, 0, 4, float("inf")]], ValueError),
        ([[0, 0, 4, 0, 4, 10**400]], ValueError),
        ([[0, 0, 4, 0, 4, True]], ValueError),
        ([[0, 0, 4, 0, 4, None]], ValueError),
        ([[0, 0, 4, 0, 4, "4"]], ValueError),
        (["004044"], ValueError),
        (["0", "0", "4", "0", "4", "4"], ValueError),
        ([0, 0, 4, 0, 4, 4], ValueError),
        ("004044", TypeError),
    ],
)
def test_codes_that_are_none(segmentation: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        decode(segmentation, (4, 4))


@pytest.mark.parametrize("form", ["list", "string"])
def test_runs_whose_sum_wraps(form: str) -> None:
    """In 64 bits 4 * 2**62 is 0. In a process of its own: a decoder that believes it dies."""
    counts = [2**62, 2**62, 2**62, 2**62, 16]
    code = {"size": [4, 4], "counts": counts if form == "list" else pack(counts)}
    assert in_child(decode, code, (4, 4))[0] == "ValueError"


@pytest.mark.parametrize("digits", [0, 1, 2, 15])
def test_polygons_are_those_of_pycocotools(digits: int) -> None:
    """Crossing outlines, holes, parts outside of the image; in fifths of a pixel and between."""
    rng = np.random.default_rng(digits)
    drawn = 0
    for _ in range(50):
        size = (int(rng.integers(1, 25)), int(rng.integers(1, 35)))
        polygons = [
            ((rng.random((rng.integers(3, 12), 2)) * 1.5 - 0.25) * size[::-1]).round(digits)
            for _ in range(2)
        ]
        segmentation = [points.ravel().tolist() for points in polygons]
        expected = by_pycocotools(segmentation, size)
        assert (decode(segmentation, size) == expected).all()
        drawn += expected.sum()
    assert drawn > 2000


@pytest.mark.parametrize("size", [(8, 6), (1, 9), (9, 1)])
def test_windows_of_runs(size: tuple[int, int]) -> None:
    """Every rectangle, the whole image and none of it included, as list and as text."""
    for top, bottom in itertools.combinations_with_replacement(range(size[0] + 1), 2):
        for left, right in itertools.combinations_with_replacement(range(size[1] + 1), 2):
            mask = np.zeros(size, dtype=bool)
            mask[top:bottom, left:right] = True
            counts = runs(mask)
            for code in (counts, [*counts, 0], [*counts, 0, 0], pack(counts)):
                assert (decode({"size": list(size), "counts": code}, size) == mask).all()


def test_a_polygon_takes_the_memory_of_its_image() -> None:
    polygon = [[100, 100, 400, 100, 250, 400]]
    tracemalloc.start()
    decode(polygon, (3000, 4000))
    assert tracemalloc.get_traced_memory()[1] < 2 * 3000 * 4000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        (np.stack([np.linspace(0, 1000, 6000), np.tile([0, 1000], 3000)], 1), "an outline of"),
        (np.zeros((2**20 + 1, 2)), "an outline of"),
        (np.array([[0, 0], [2**19, 0], [0, 1]]), "an outline of"),
        (np.array([[0, 0], [2**28, 0], [0, 1]]), "expected pixels"),
    ],
    ids=["zigzag", "points", "edge", "far"],
)
def test_long_polygons_are_refused(polygon: NDArray[Any], message: str) -> None:
    """pycocotools would take as much memory as they are long."""
    failed, found = in_child(decode, [polygon.ravel().tolist()], (1000, 1000))
    assert failed == "ValueError" and message in found


def test_a_polygon_that_is_just_short_enough() -> None:
    polygon = [[0, 0, 2**19 - 9, 0, 0, 9]]
    assert (decode(polygon, (20, 30)) == by_pycocotools(polygon, (20, 30))).all()


@pytest.mark.parametrize(
    "segmentation",
    [[[0, 0, 4, 0, 4, 4]], {"size": [2**13, 2**13 + 1], "counts": [2**26 + 2**13 - 1, 1]}],
    ids=["polygon", "runs"],
)
def test_images_of_too_many_pixels(segmentation: Any) -> None:
    failed, found = in_child(decode, segmentation, (2**13, 2**13 + 1))
    assert failed == "ValueError" and "at most 67108864 pixels" in found


def test_a_long_number_takes_linear_time() -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="13 characters"):
        decode({"size": [4, 4], "counts": 200_000 * "o" + "0"}, (4, 4))
    assert time.process_time() - start < 0.3


def coco(root: Path) -> Path:
    """Two images with a polygon, a code and a crowd; a third whose size does not fit; a fourth
    without annotations; a fifth that leads out of the directory."""
    for name in ("a.png", "b.png", "c.png", "d.png"):
        Image.fromarray(noise(20, 30)).save(root / name)
    whole = {"size": [20, 30], "counts": [600 - 40, 40]}  # the last two columns
    annotations = [
        {"image_id": 1, "category_id": 5, "segmentation": [[0, 0, 10, 0, 10, 20, 0, 20]]},
        {"image_id": 1, "category_id": 7, "segmentation": whole, "iscrowd": 0},
        {"image_id": 2, "category_id": 7, "segmentation": [[0, 0, 10, 0, 10, 20, 0, 20]]},
        {"image_id": 2, "category_id": 7, "segmentation": whole, "iscrowd": 1},
        {"image_id": 3, "category_id": 7, "segmentation": {"size": [9, 9], "counts": [81]}},
        {"image_id": 5, "category_id": 7, "segmentation": [[0, 0, 1, 0, 1, 1]]},
    ]
    files = ["a.png", "b.png", "c.png", "d.png", "../out.png"]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(files, start=1)],
        "categories": [{"id": 5, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": annotations,
    }
    (root / "instances.json").write_text(json.dumps(content))
    return root / "instances.json"


def test_images_with_objects(tmp_path: Path) -> None:
    images = CocoImages(tmp_path, coco(tmp_path))
    assert [images.name(i) for i in range(len(images))] == [
        "a.png", "b.png", "c.png", "../out.png",
    ]  # fmt: skip
    sample = images[0]
    assert sample.mask is not None
    assert sample.object_labels == {"category": {0: "cat", 1: "dog"}}
    assert (sample.mask[:, :9] == 0).all()
    assert (sample.mask[:, 28:] == 1).all()
    assert (sample.mask[:, 12:28] == -1).all()
    crowd = images[1]
    assert crowd.mask is not None
    assert crowd.object_labels == {"category": {0: "dog"}}
    assert (crowd.mask[:, 28:] == -1).all()
    with pytest.raises(SkipImage, match="annotations that do not fit"):
        images[2]
    with pytest.raises(SkipImage, match="leads out"):
        images[3]


def test_entries_of_one_file_are_one_image(tmp_path: Path) -> None:
    Image.fromarray(noise(20, 30)).save(tmp_path / "a.png")
    left, right = [[0, 0, 10, 0, 10, 20, 0, 20]], [[20, 0, 30, 0, 30, 20, 20, 20]]
    write(
        tmp_path / "a.json",
        images=[{"id": 2, "file_name": "a.png"}, {"id": "1", "file_name": "a.png"}],
        annotations=[
            {"image_id": 2.0, "category_id": "5", "segmentation": left},
            {"image_id": 1, "category_id": 5.0, "segmentation": right},
        ],
    )
    images = CocoImages(tmp_path, tmp_path / "a.json")
    assert len(images) == 1
    sample = images[0]
    assert sample.mask is not None
    assert (sample.mask[:, :10] == 1).all() and (sample.mask[:, 20:] == 0).all()
    assert sample.object_labels == {"category": {0: "cat", 1: "cat"}}


@pytest.mark.parametrize(("width", "height"), [(60, 40), (20, 30), (30, None), (None, 21)])
def test_annotations_of_an_image_of_another_size(
    tmp_path: Path, width: int | None, height: int | None
) -> None:
    """Of the image before it was made smaller, say: its polygons would be of other pixels."""
    Image.fromarray(noise(20, 30)).save(tmp_path / "a.png")
    said = {"id": 1, "file_name": "a.png", "width": width, "height": height}
    images = CocoImages(tmp_path, write(tmp_path / "a.json", images=[said]))
    if (width, height) == (30, None):
        assert images[0].mask is not None
        return
    with pytest.raises(SkipImage, match="annotations of an image of another size"):
        images[0]


def write(path: Path, **parts: Any) -> Path:
    """An annotation file with one image, one category and one object, but for the parts given."""
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 5, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 5, "segmentation": [[0, 0, 4, 0, 4, 4]]}],
    }
    path.write_text(json.dumps({**content, **parts}))
    return path


@pytest.mark.parametrize(
    "annotation",
    [
        {"segmentation": {"size": [20, 30], "counts": [600.0]}},
        {"category_id": 6},
        {"category_id": None},
        {"category_id": [5]},
        {"category_id": True},
        {"category_id": 5.5},
        {"iscrowd": "0"},
        {"iscrowd": float("nan")},
        {"segmentation": [[0, 0, 4, 0, 4, float("nan")]]},
        {"segmentation": 7},
    ],
)
def test_one_bad_annotation_skips_its_image(tmp_path: Path, annotation: Any) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(noise(20, 30)).save(tmp_path / name)
    good = {"category_id": 5, "segmentation": [[0, 0, 4, 0, 4, 4]]}
    write(
        tmp_path / "a.json",
        images=[{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        annotations=[{"image_id": 1, **good, **annotation}, {"image_id": 2, **good}],
    )
    images = CocoImages(tmp_path, tmp_path / "a.json")
    with pytest.raises(SkipImage, match="annotations that do not fit"):
        images[0]
    assert images[1].object_labels == {"category": {0: "cat"}}


@pytest.mark.parametrize("name", ["", ".", "loop.png", "a\0.png", "\ud800.png", 300 * "a", "fifo"])
def test_names_that_no_image_has_are_skipped(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "fifo")
    Image.fromarray(noise(20, 30)).save(tmp_path / "b.png")
    path = write(
        tmp_path / "a.json",
        images=[{"id": 1, "file_name": name or "."}, {"id": 2, "file_name": "b.png"}],
        annotations=[{"image_id": i, "category_id": 5, "segmentation": []} for i in (1, 2)],
    )
    images = CocoImages(tmp_path, path)
    with pytest.raises(SkipImage):
        images[0]
    images.name(0).encode("utf-8")
    assert images[1].image.shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"images": 3}, "expected COCO annotations.* got 3 for images"),
        ({"annotations": {"1": 2}}, "expected COCO annotations.* for annotations"),
        ({"images": [3]}, r"images\[0\]: expected an object, got 3"),
        (
            {"images": [{"file_name": "a.png"}]},
            r"images\[0\].id: expected a whole.* got None",
        ),
        ({"images": [{"id": True, "file_name": "a.png"}]}, r"images\[0\].id: .* got True"),
        ({"images": [{"id": float("inf"), "file_name": "a.png"}]}, r"images\[0\].id: .* got inf"),
        ({"images": [{"id": 1.5, "file_name": "a.png"}]}, r"images\[0\].id: .* got 1.5"),
        ({"images": [{"id": 1}]}, r"images\[0\].file_name: expected a name, got None"),
        ({"images": [{"id": 1, "file_name": ["a"]}]}, r"images\[0\].file_name: expected a name"),
        (
            {"images": 2 * [{"id": 1, "file_name": "a.png"}]},
            r"images\[1\].id: .* which is taken",
        ),
        (
            {"categories": 2 * [{"id": 5, "name": "cat"}]},
            r"categories\[1\].id: .* which is taken",
        ),
        ({"categories": [{"id": 5, "name": None}]}, r"categories\[0\].name: expected a name"),
        ({"annotations": [{"image_id": "a"}]}, r"annotations\[0\].image_id: .* got 'a'"),
        ({"annotations": [[1]]}, r"annotations\[0\]: expected an object"),
        ({"annotations": [{"image_id": 9}]}, "expected annotations of its images, got none"),
    ],
)
def test_parts_that_are_none(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        CocoImages(tmp_path, write(tmp_path / "a.json", **parts))


def test_images_are_in_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images: expected a directory, got .*absent"):
        CocoImages(tmp_path / "absent", write(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", "no", "", "3", '{"images": [], "categories": []}', '{"images": 3}'),
        *('{"images": ' * 200_000, '{"images": [' + 5000 * "9" + "]}", '{"images": ["caf\xe9"]}'),
    ],
    ids=lambda content: content[:20],
)
def test_files_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"^\S+a\.json: ") as refused:
        CocoImages(tmp_path, tmp_path / "a.json")
    assert len(str(refused.value)) < len(str(tmp_path)) + 200


def test_a_large_file_of_nothing_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 100_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.json: expected COCO annotations"):
        CocoImages(tmp_path, tmp_path / "a.json")
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


def test_a_process_that_dies_fails_a_test() -> None:
    """And the next one is another: the fuzzers rely on it."""
    with pytest.raises(AssertionError, match="the process died"):
        in_child(os._exit, 1)
    assert in_child(len, "abc") == ("", 3)
