# SPDX-License-Identifier: Apache-2.0
"""I changed my images, masks and chat template, ran the checkup again and got the old numbers.

Results were taken up again by the names of images, not by what is in them, and in Python by the
directory alone: a second model got the first one's figures. Everything that the numbers depend on
counts now; where any of it has changed, all is measured anew, and a line says why.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from prereg_kernels.checkup import checkup, report
from prereg_kernels.checkup.images.datasets import ImageFolder
from prereg_kernels.checkup.images.image_batches import ImageBatches
from prereg_kernels.checkup.report import page
from prereg_kernels.cli.commands import main
from tests.checkup.pictures import (
    QWEN_PROCESSOR,
    make_loaded,
    noise,
    save_folder,
    save_model,
    save_tokenizer,
)

TEMPLATE = "{% for m in messages %}hello <image> look{% endfor %}"


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and say nothing else."""
    monkeypatch.setattr(page, "draw_all", lambda *_: {})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_folder(tmp_path, 6)
    save_model(tmp_path / "model")
    save_tokenizer(tmp_path / "model", TEMPLATE)
    _write_coco(tmp_path, [0, 0, 20, 0, 20, 30, 0, 30])
    (tmp_path / "labels.csv").write_text("".join(f"0{i}.png,{'ab'[i % 2]}\n" for i in range(6)))
    return tmp_path


def _write_coco(place: Path, polygon: list[int]) -> None:
    names = sorted(path.name for path in (place / "images").glob("*/*.png"))
    folders = ("light", "dark")
    images = [{"id": i, "file_name": f"{folders[i % 2]}/{name}"} for i, name in enumerate(names)]
    other = [22, 0, 40, 0, 40, 30, 22, 30]
    annotations = [
        {"image_id": i, "category_id": 1, "segmentation": [points]}
        for i in range(len(images))
        for points in (polygon, other)
    ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}],
    }
    (place / "coco.json").write_text(json.dumps(content))


def _other_images(place: Path) -> None:
    for i, path in enumerate(sorted((place / "images").rglob("*.png"))):
        Image.fromarray(noise(32, 40, seed=100 + i)).save(path)


def _images_unpacked_with_old_times(place: Path) -> None:
    """As tar, cp -p and rsync do: other bytes, as many, of the same time."""
    for i, path in enumerate(sorted((place / "images").rglob("*.bmp"))):
        before = path.stat()
        Image.fromarray(noise(32, 40, seed=100 + i)).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size


def _other_masks(place: Path) -> None:
    for path in (place / "masks").rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)


def _other_template(place: Path) -> None:
    save_tokenizer(place / "model", TEMPLATE.replace("hello", "bye look"))


def _other_labels(place: Path) -> None:
    lines = (f"0{i}.png,{'ab'[i % 3 == 0]}\n" for i in range(6))
    (place / "labels.csv").write_text("".join(lines))


def _other_weights(place: Path) -> None:
    """Written at the same time, of the same size."""
    path = place / "model" / "model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _other_processor(place: Path) -> None:
    path = place / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))


MASKS = ("--masks", "masks")


@pytest.mark.parametrize(
    ("change", "arguments", "why"),
    [
        (_other_images, MASKS, "images"),
        (_images_unpacked_with_old_times, (), "images"),
        (_other_masks, MASKS, "masks"),
        (lambda place: _write_coco(place, [5] * 6), ("--masks", "coco.json"), "annotations"),
        (_other_labels, ("--labels", "labels.csv"), "labels"),
        (_other_template, (), "prompt"),
        (_other_weights, (), "weights"),
        (_other_processor, (), "processor"),
    ],
)
def test_the_numbers_are_those_of_a_fresh_directory(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
    arguments: tuple[str, ...],
    why: str,
) -> None:
    if change is _images_unpacked_with_old_times:
        for path in (place / "images").rglob("*.png"):
            Image.open(path).save(path.with_suffix(".bmp"))
            path.unlink()

    def numbers(out: str) -> dict[str, Any]:
        command = ["prereg", "diagnose", "model", "--images", "images", "--splits", "2"]
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [*command, *arguments, "--out", out])
        main()
        found: dict[str, Any] = json.loads((place / out / "checkup.json").read_text())
        return found

    old = numbers("out")
    change(place)
    new, truth = numbers("out"), numbers("fresh")
    assert new == truth != old
    assert [record.getMessage() for record in caplog.records] == [
        f"model: measured anew, for what was measured in out before had other {why}"
    ]
    caplog.clear()
    shards = list((place / "out" / "shards").rglob("*.safetensors"))
    written = [path.stat().st_mtime_ns for path in shards]
    assert numbers("out") == new
    assert [path.stat().st_mtime_ns for path in shards] == written
    assert not caplog.records


def test_two_models_with_one_directory_are_two_models(tmp_path: Path) -> None:
    """Each gets its own figures, and the page of both still finds those of the first."""
    save_folder(tmp_path, 6)
    loaded = make_loaded("qwen2_5_vl", Qwen2VLImageProcessorPil(**QWEN_PROCESSOR))
    batches = ImageBatches(loaded, ImageFolder(tmp_path / "images"))
    model: Any = loaded.model
    first = checkup(model, batches, tmp_path / "out", splits=2)
    patches = first.measured.shown()[0].patches
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] += 8
    second = checkup(model, batches, tmp_path / "out", splits=2)
    truth = checkup(model, batches, tmp_path / "other", splits=2)
    assert second.curves == truth.curves
    assert second.curves["cosine to input"] != first.curves["cosine to input"]
    assert first.measured.shown()[0].patches.equal(patches)
    assert not second.measured.shown()[0].patches.equal(patches)
    report(tmp_path / "out", [first, second])


def test_other_batches_in_one_directory(tmp_path: Path) -> None:
    """Batches of a user's own, of which nothing is known but what is in them."""
    save_folder(tmp_path, 6)
    loaded = make_loaded("qwen2_5_vl", Qwen2VLImageProcessorPil(**QWEN_PROCESSOR))
    folder = ImageBatches(loaded, ImageFolder(tmp_path / "images"), size=3)
    batches = [folder[i] for i in range(len(folder))]
    first = checkup(loaded.model, batches, tmp_path / "out", splits=2)
    pixels = batches[1].inputs["pixel_values"]
    pixels[7] = pixels[7].flip(0)
    second = checkup(loaded.model, batches, tmp_path / "out", splits=2)
    shutil.rmtree(tmp_path / "out")
    truth = checkup(loaded.model, batches, tmp_path / "out", splits=2)
    assert second.curves == truth.curves
    assert second.curves["cosine to input"] != first.curves["cosine to input"]
