"""COCO's annotations: codes written by an encoder of this file, and by COCO's own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from prereg_kernels.diagnostics.coco import CocoImages, decode
from prereg_kernels.diagnostics.images import SkipImage
from tests.diagnostics.pictures import noise


def runs(region: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs down the columns, beginning with background."""
    flat = region.T.ravel()
    ends = [*(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), len(flat)]
    lengths = np.diff([0, *ends]).tolist()
    return [0, *lengths] if flat[0] else lengths


def pack(counts: list[int]) -> str:
    """COCO's string: the difference to the run two before, five bits a character."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


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
    ],
)
def test_codes_that_are_none(segmentation: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        decode(segmentation, (4, 4))


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


@pytest.mark.parametrize(
    "content", ["[]", "{}", "no", '{"images": [], "categories": []}', '{"images": 3}']
)
def test_files_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: expected"):
        CocoImages(tmp_path, tmp_path / "a.json")
