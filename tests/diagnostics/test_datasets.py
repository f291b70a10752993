"""Image folders: classes from directories and files, masks, subsets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prereg_kernels.diagnostics.datasets import ImageFolder, Subset, read_labels
from prereg_kernels.diagnostics.images import SkipImage
from tests.diagnostics.pictures import noise, save_folder, two_objects


def test_a_folder_a_class(tmp_path: Path) -> None:
    images = ImageFolder(save_folder(tmp_path, 4) / "images")
    names = ["dark/01.png", "dark/03.png", "light/00.png", "light/02.png"]
    assert [images.name(i) for i in range(len(images))] == names
    assert [images[i].labels["class"] for i in range(4)] == ["dark", "dark", "light", "light"]
    sample = images[2]
    assert sample.image.tolist() == (noise(32, 40, seed=0) // 4 + 190).tolist()
    assert sample.mask is None


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 2) / "images"
    Image.fromarray(noise(4, 4)).save(root / "top.png")
    assert all(not ImageFolder(root)[i].labels for i in range(3))


@pytest.mark.parametrize("by", ["path", "name"])
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_labels_of_a_file(tmp_path: Path, kind: str, by: str) -> None:
    root = save_folder(tmp_path, 2) / "images"
    table = {"dark/01.png" if by == "path" else "01.png": "cat"}
    path = tmp_path / f"labels.{kind}"
    lines = "".join(f"{name},{label}\n" for name, label in table.items())
    path.write_text(json.dumps(table) if kind == "json" else lines)
    images = ImageFolder(root, labels=path)
    assert [images[i].labels for i in range(2)] == [{"class": "cat"}, {}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x.png\n", r"a\.csv:1: expected name,class, got 1 fields"),
        ("a.csv", "", "expected labels, got none"),
        ("a.json", "[1]", "expected an object"),
        ("a.json", '{"x": [1]}', "expected an object"),
        ("a.json", "{", "not valid JSON"),
        ("a.csv", "x,cat\ny,dog\nx,cat\nx,cow", "expected one class of x, got cat and cow"),
        ("a.json", '{"x": "cat", "x": "cow"}', "expected one class of x, got cat and cow"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / name)


def test_labels_of_other_images(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 2) / "images"
    (tmp_path / "a.csv").write_text("other.png,cat\n")
    with pytest.raises(ValueError, match=r"such as dark/01\.png, got labels of 1 others"):
        ImageFolder(root, labels=tmp_path / "a.csv")


def test_masks_of_instances_and_of_classes(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 2)
    expected = two_objects(32, 40)
    sample = ImageFolder(root / "images", masks=root / "masks")[0]
    assert sample.mask is not None
    assert (sample.mask == np.where(expected == 0, -1, expected)).all()
    assert not sample.object_labels
    classes = ImageFolder(
        root / "images", masks=root / "masks", masks_are="classes", background=[255]
    )[0]
    assert classes.mask is not None
    assert (classes.mask == expected).all()  # 0 is a class here, as in COCO-Stuff
    assert classes.object_labels == {"class": {0: "0", 1: "1", 2: "2"}}


def test_masks_that_do_not_fit_are_skipped(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 6)
    masks = sorted((root / "masks").rglob("*.png"))
    masks[0].unlink()
    Image.fromarray(np.zeros((40, 32), dtype=np.uint8)).save(masks[1])
    masks[2].write_bytes(b"")
    Image.fromarray(noise(32, 40)).save(masks[3])
    Image.fromarray(two_objects(16, 20).astype(np.uint8)).save(masks[4])  # half the resolution
    images = ImageFolder(root / "images", masks=root / "masks")
    for i, reason in enumerate(("no such file", "not of the image's", "damaged", "mode RGB")):
        with pytest.raises(SkipImage, match=f"^.*mask.*{reason}"):
            images[i]
    half = images[4].mask
    assert half is not None and half.shape == (16, 20)


def test_sets_that_are_none(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="images: expected a directory, got"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(ValueError, match="images: expected image files below"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(ValueError, match="masks: expected a directory"):
        ImageFolder(root / "images", masks=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"masks: expected a file such as .*01\.png"):
        ImageFolder(root / "images", masks=tmp_path / "empty")
    with pytest.raises(ValueError, match="masks_are: expected one of"):
        ImageFolder(root / "images", masks_are="polygons")


def test_a_subset_is_drawn_from_all_classes(tmp_path: Path) -> None:
    images = ImageFolder(save_folder(tmp_path, 20, size=(4, 4)) / "images")
    drawn = Subset(images, 10)
    names = [drawn.name(i) for i in range(len(drawn))]
    assert len(set(names)) == 10
    assert {name.split("/")[0] for name in names} == {"dark", "light"}
    assert [drawn[i].name for i in range(10)] == names
    assert names == [Subset(images, 10).name(i) for i in range(10)]
    with pytest.raises(ValueError, match="limit"):
        Subset(images, 0)
