# SPDX-License-Identifier: Apache-2.0
"""Image files of every mode, damaged ones and bombs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from prereg_kernels.checkup.images.reading import SkipImage, inside, read_image, read_mask

RGB = np.array([[[250, 20, 30], [0, 128, 255]], [[9, 9, 9], [255, 255, 255]]], dtype=np.uint8)
GREY = np.array([[0, 100], [200, 255]], dtype=np.uint8)


def saved(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.fromarray(RGB), "png", RGB),
        (Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE), "png", RGB),
        (Image.fromarray(GREY), "png", np.repeat(GREY[:, :, None], 3, axis=2)),
        (Image.fromarray(GREY > 128), "png", 255 * np.repeat((GREY > 128)[:, :, None], 3, axis=2)),
        (
            Image.fromarray(GREY.astype(np.uint16) * 256 + 7),
            "png",
            np.repeat(GREY[:, :, None], 3, axis=2),
        ),
        (
            Image.fromarray(np.full((2, 2, 4), [0, 255, 255, 0], dtype=np.uint8), mode="CMYK"),
            "tif",
            np.full((2, 2, 3), [255, 0, 0]),
        ),
    ],
    ids=["RGB", "P", "L", "1", "I;16", "CMYK"],
)
def test_modes(tmp_path: Path, image: Image.Image, suffix: str, expected: np.ndarray) -> None:
    found = read_image(saved(tmp_path / f"a.{suffix}", image))
    assert found.dtype == np.uint8
    assert found.tolist() == expected.tolist()


def test_transparency_becomes_white(tmp_path: Path) -> None:
    pixels = np.dstack([RGB, np.array([[255, 0], [128, 255]], dtype=np.uint8)])
    found = read_image(saved(tmp_path / "a.png", Image.fromarray(pixels)))
    assert found[0].tolist() == [RGB[0, 0].tolist(), [255, 255, 255]]
    assert np.abs(found[1, 0].astype(int) - 132).max() <= 1  # halfway from 9 to 255


def test_exif_turns(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(np.zeros((2, 5, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (5, 2, 3)


def broken(path: Path, how: str) -> Path:
    if how == "text":
        path.write_text("not an image")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif how == "chunk":
        Image.fromarray(RGB).save(path)
        data = bytearray(path.read_bytes())
        data[41] ^= 0xFF  # in the compressed pixels
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("how", ["text", "empty", "cut", "chunk"])
def test_damaged_files_are_skipped(tmp_path: Path, how: str) -> None:
    with pytest.raises(SkipImage, match="damaged"):
        read_image(broken(tmp_path / "a.png", how))


@pytest.mark.parametrize("limit", [3, 2], ids=["between limit and twice", "above twice"])
def test_bombs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (5, 1)))
    assert read_image(path).shape == (1, 5, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(SkipImage, match=f"more than {limit} pixels"):
        read_image(path)


def test_unknown_ranges_are_skipped(tmp_path: Path) -> None:
    floats = saved(tmp_path / "a.tif", Image.fromarray(np.ones((2, 2), dtype=np.float32)))
    wide = saved(tmp_path / "b.tif", Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)))
    for path in (floats, wide):
        with pytest.raises(SkipImage, match="range is unknown"):
            read_image(path)


def test_masks_are_numbers(tmp_path: Path) -> None:
    ids = np.array([[0, 3], [255, 7]], dtype=np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette.putpalette([i // 3 for i in range(768)])
    for image in (Image.fromarray(ids), palette):
        assert read_mask(saved(tmp_path / "a.png", image)).tolist() == ids.tolist()
    wide = Image.fromarray(ids.astype(np.uint16) * 200)
    found = read_mask(saved(tmp_path / "b.png", wide))
    assert found.tolist() == [[0, 600], [51000, 1400]]
    with pytest.raises(SkipImage, match="mode RGB"):
        read_mask(saved(tmp_path / "c.png", Image.fromarray(RGB)))


def test_other_formats_start_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their content, whatever their name: Pillow hands EPS to Ghostscript, if it is there."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(SkipImage, match="damaged, or not an image"):
        read_image(path)
    assert not started.exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "link/x"])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(SkipImage, match="leads out"):
        inside(root, name)
    assert inside(root, "a/b.png") == (root / "a/b.png").resolve()
