# SPDX-License-Identifier: Apache-2.0
"""Images and masks from files that may be anything: read, or refused with a reason."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")

# What a file is its content says, not its name. Others are not tried: EPS would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF")

# What Pillow's decoders raise on damaged files, beside OSError.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


class SkipImage(Exception):  # noqa: N818 - not an error of the run: it goes on without the image
    """An image cannot be used; the message is the reason, in words that can be counted by."""


def read_image(path: Path | IO[bytes]) -> NDArray[np.uint8]:
    """(H, W, 3) of an image file, as `open_rgb` reads it."""
    return np.asarray(open_rgb(path))


def open_rgb(path: Path | IO[bytes]) -> Image.Image:
    """RGB of an image file of any mode, open or not, turned as its EXIF data say.

    Transparent pixels are put on white; 16-bit greys keep their upper 8 bits.

    Raises:
        SkipImage: damaged, too large (Pillow's limit against decompression bombs) or in a mode
            without a known range.
    """
    image = _open(path)
    if image.mode == "F":
        raise SkipImage("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise SkipImage("integer pixels outside of 16 bits, whose range is unknown")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_mask(path: Path) -> NDArray[np.int64]:
    """(H, W) ids of a mask file with one number a pixel: modes L, P, 1, I and I;16.

    Raises:
        SkipImage: damaged, too large, or with colours instead of numbers.
    """
    image = _open(path)
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise SkipImage(f"a mask in mode {image.mode}; expected one number a pixel")
    return np.asarray(image).astype(np.int64)


def _open(path: Path | IO[bytes]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # a warning between one and two times the limit, an error above: one limit here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise SkipImage(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise SkipImage("no such file") from None
    except _DAMAGED:
        raise SkipImage("damaged, or not an image") from None


def inside(root: Path, name: str) -> Path:
    """The file of that name below `root`.

    Raises:
        SkipImage: the name, or a link, leads out of it; or it is no name of a file.
    """
    try:
        path = (root / name).resolve()
        special = path.exists() and not path.is_file()
    except (OSError, RuntimeError, ValueError):  # too long, loops of links, NUL, lone surrogates
        raise SkipImage("a name that no file can have, or links in a circle") from None
    if not path.is_relative_to(root.resolve()):
        raise SkipImage("a name or a link that leads out of the directory")
    if special:  # a pipe would be waited for
        raise SkipImage("no file, but a directory or a device")
    return path
