# SPDX-License-Identifier: Apache-2.0
"""Image folders: classes from directories and files, masks, subsets."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prereg_kernels.checkup.images.datasets import ImageFolder, Subset, read_labels
from prereg_kernels.checkup.images.reading import SkipImage
from tests.checkup.pictures import noise, save_folder, two_objects


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
        ("a.csv", f"x,cat\nx,{9000 * 'c'}", "expected one class of x, got cat and ccc"),
        ("a.json", "3", "expected an object"),
        ("a.json", '{"x": NaN}', "expected an object"),
        ("a.json", '{"x": null}', "expected an object"),
        ("a.json", 200_000 * '{"x":' + "1", "nested too deeply"),
        ("a.json", 200_000 * "[", "expected an object"),
        ("a.json", '{"x": ' + 5000 * "9" + "}", "4300 digits"),
        ("a.json", b'{"x": "caf\xe9"}', "expected UTF-8 text"),
        ("a.json", '{"x": "cat"}'.encode("utf-16"), "expected UTF-8 text"),
        ("a.json", 4_000_000 * b"\0", "expected an object"),
        ("a.json", 4_000_000 * b" ", "expected an object"),
        ("a.csv", "x,cat\ny," + 200_000 * "z", r"a\.csv:2: field larger than field limit"),
        ("a.csv", 4_000_000 * b"\0", r"a\.csv:1: "),
        ("a.csv", 'x,"cat\ny,dog\n', r"a\.csv:2: unexpected end of data"),
        ("a.csv", "x,cat\ny, \n", r"a\.csv:2: expected a class of y, got none"),
        ("a.csv", "file,class,box\nx,cat,3\n", r"a\.csv:1: expected name,class, got 3 fields"),
        ("a.csv", "x;cat\n", r"a\.csv:1: expected name,class, got 1 fields"),
        ("a.csv", b"x,caf\xe9\n", r"a\.csv: expected UTF-8 text"),
        ("a.csv", "x,cat\n".encode("utf-16"), r"a\.csv: expected UTF-8 text"),
    ],
    ids=lambda value: str(value)[:20].encode("unicode_escape").decode(),
)
def test_labels_that_are_none(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as refused:
        read_labels(tmp_path / name)
    assert str(refused.value).startswith(str(tmp_path / name))
    assert len(str(refused.value)) < len(str(tmp_path)) + 200


def test_classes_are_text_that_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": "\\ud800\\u001b[31m", "y": 3}')
    assert read_labels(tmp_path / "a.json") == {"x": r"\ud800\x1b[31m", "y": "3"}
    (tmp_path / "a.csv").write_text('x,"two\u2028lines"\r\n"a,b",cat\r\n', encoding="utf-8-sig")
    assert read_labels(tmp_path / "a.csv") == {"x": r"two\u2028lines", "a,b": "cat"}


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


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_masks_of_any_mode_of_numbers(tmp_path: Path, mode: str) -> None:
    root = save_folder(tmp_path, 1)
    expected = two_objects(32, 40) > 1 if mode == "1" else two_objects(32, 40)
    pixels = expected.astype({"P": "uint8", "I;16": "uint16", "1": "bool"}[mode])
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([255 - i // 3 for i in range(768)])  # colours are not looked at
    assert image.mode == mode
    image.save(next((root / "masks").rglob("*.png")))
    mask = ImageFolder(root / "images", masks=root / "masks")[0].mask
    assert mask is not None
    assert (mask == np.where(expected == 0, -1, expected)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB"])
def test_masks_with_colours_are_skipped(tmp_path: Path, mode: str) -> None:
    root = save_folder(tmp_path, 1)
    Image.new(mode, (40, 32)).save(next((root / "masks").rglob("*.png")))
    with pytest.raises(SkipImage, match=f"mask: a mask in mode {mode}"):
        ImageFolder(root / "images", masks=root / "masks")[0]


def test_links_out_of_the_directory_are_skipped(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 3)
    secret = tmp_path / "secret.png"
    Image.fromarray(noise(32, 40)).save(secret)
    image, inside = root / "images" / "light" / "00.png", root / "images" / "dark" / "01.png"
    image.unlink()
    image.symlink_to(secret)
    (root / "images" / "light" / "within.png").symlink_to(inside)
    mask = root / "masks" / "light" / "02.png"
    mask.unlink()
    mask.symlink_to(secret)
    images = ImageFolder(root / "images", masks=root / "masks")
    names = {images.name(i): i for i in range(len(images))}
    with pytest.raises(SkipImage, match=r"^a name or a link that leads out"):
        images[names["light/00.png"]]
    with pytest.raises(SkipImage, match=r"^mask: a name or a link that leads out"):
        images[names["light/02.png"]]
    plain = ImageFolder(root / "images")
    assert (plain[names["light/within.png"]].image == plain[names["dark/01.png"]].image).all()


def test_links_that_lead_nowhere_are_skipped_and_counted(tmp_path: Path) -> None:
    root = save_folder(tmp_path, 1) / "images"
    (root / "light" / "circle.png").symlink_to("circle.png")
    (root / "light" / "gone.png").symlink_to("absent.png")
    (root / "light" / "again").symlink_to(root)
    os.mkfifo(root / "light" / "pipe.png")
    images = ImageFolder(root)
    assert [images.name(i) for i in range(len(images))] == [
        "light/00.png", "light/circle.png", "light/gone.png",
    ]  # fmt: skip
    for i in (1, 2):
        with pytest.raises(SkipImage):
            images[i]


def test_a_link_to_other_directories_is_an_error(tmp_path: Path) -> None:
    """Nothing of it would be read: a class would be missing, without a word."""
    root = save_folder(tmp_path, 2) / "images"
    (root / "other").symlink_to(tmp_path / "masks")
    with pytest.raises(ValueError, match=r"^images: expected directories, got the link .*other"):
        ImageFolder(root)


def test_what_is_no_class(tmp_path: Path) -> None:
    """Hidden directories, as Jupyter's, and the one that a checkup writes into."""
    root = save_folder(tmp_path, 4) / "images"
    for name in (".ipynb_checkpoints", "dark/.hidden", "out/plots"):
        (root / name).mkdir(parents=True)
        Image.fromarray(noise(4, 4)).save(root / name / "x.png")
    names = ["dark/01.png", "dark/03.png", "light/00.png", "light/02.png"]
    images = ImageFolder(root, without=root / "dark" / ".." / "out")
    assert [images.name(i) for i in range(len(images))] == names
    assert ImageFolder(root).label(4) == "out"


def test_names_that_are_not_text_can_be_shown(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Image.fromarray(noise(4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", folder + b"/\x1b[31m\xff.png")
    images = ImageFolder(tmp_path)
    sample = images[0]
    assert sample.name == images.name(0) == r"caf\udce9/\x1b[31m\udcff.png"
    assert sample.labels == {"class": r"caf\udce9"}
    assert (sample.image == noise(4, 4)).all()


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


class Classes:
    """So many images of each class, whose pixels nobody reads."""

    def __init__(self, counts: dict[str | None, int]) -> None:
        self.labels = [label for label, count in counts.items() for _ in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> str | None:
        return self.labels[index]

    def name(self, index: int) -> str:
        return f"{self.labels[index]}/{index}"


@pytest.mark.parametrize(
    ("counts", "count", "expected"),
    [
        (dict.fromkeys(map(str, range(1000)), 50), 512, 64 * [8]),  # ImageNet's validation images
        (dict.fromkeys(map(str, range(900)), 3), 512, [2] + 170 * [3]),
        (dict.fromkeys("abc", 20), 10, [5, 5]),
        (dict.fromkeys("ab", 20) | {None: 20}, 5, None),  # both, as they come
        ({None: 30}, 12, None),
        (dict.fromkeys("abcd", 9), 32, None),
    ],
)
def test_a_probe_can_have_seen_the_classes_of_a_subset(
    counts: dict[str | None, int], count: int, expected: list[int] | None
) -> None:
    """Drawn from all images of 1,000 classes, 512 have 323 classes with one image each."""
    samples: Any = Classes(counts)
    drawn = Subset(samples, count)
    names = [drawn.name(i) for i in range(len(drawn))]
    assert len(names) == len(set(names)) == count
    found = Counter(drawn.label(i) for i in range(count))
    if expected is None:
        order = np.random.default_rng(0).permutation(len(samples))[:count]
        assert names == [samples.name(i) for i in order]
    else:
        assert sorted(found.values()) == expected


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
