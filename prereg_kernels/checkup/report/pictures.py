# SPDX-License-Identifier: Apache-2.0
"""Pictures of a page: files in every theme, and what the page shows of them, with words for each.

A page shows the panels of a figure apart, so that on a phone they go below each other. What cannot
be cut stays whole, and the page lets people scroll it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from prereg_kernels._util.files import write_whole
from prereg_kernels.checkup.report.style import THEMES, theme

_PADDING = 8  # pixels around what is cut out
_READABLE = 0.6  # of its size, to which a page may shrink a whole picture


@dataclass(frozen=True, repr=False)
class Drawing:
    """A figure, and what it shows in words.

    Attributes:
        words: of each of `panels`, or one text of the whole.
        panels: the axes that a page shows apart.
        key: {what a line is of: the theme's name of its colour}; a page has it beside the panels.
    """

    figure: Figure
    words: Sequence[str]
    panels: Sequence[Axes] = ()
    key: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What it shows, for who does not see it."""
        return " ".join(self.words)

    def _repr_png_(self) -> bytes:
        """The whole figure, which Jupyter shows of a cell that ends in a drawing."""
        return _png(_rendered(self).whole)


@dataclass(frozen=True)
class Shot:
    """An image of a page: base64 by theme, its size in pixels, and what it shows."""

    data: Mapping[str, str]
    width: int
    height: int
    words: str

    @property
    def least(self) -> int:
        """The width, in pixels, below which its letters are too small."""
        return round(_READABLE * self.width)


@dataclass(frozen=True)
class Picture:
    """A drawing as a page shows it."""

    shots: Sequence[Shot]
    apart: bool
    key: Mapping[str, str]


class _Layout(NamedTuple):
    """Where things are in a figure, in every theme.

    Attributes:
        places: of its axes, in shares of the figure.
        whole: what is not empty, in pixels: left, bottom, right, top.
        panels: the same of each panel, with its labels.
    """

    places: Sequence[Bbox]
    whole: Sequence[float]
    panels: Sequence[Sequence[float]]


class _Rendered(NamedTuple):
    whole: Image.Image
    panels: Sequence[Image.Image]
    layout: _Layout


Draw = Callable[[Mapping[str, str]], Iterable[tuple[str, Drawing]]]
"""From a theme's colours to drawings by name."""


def draw_all(draw: Draw, directory: Path) -> dict[str, Picture]:
    """Draw in every theme; `directory` gets the whole figures, NAME.png and NAME-dark.png.

    Raises:
        OSError: a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, Sequence[Image.Image]]] = {}
    layouts: dict[str, _Layout] = {}
    drawings: dict[str, Drawing] = {}
    for name in THEMES:
        with theme(name) as colours:
            for picture, drawing in draw(colours):
                whole, panels, layouts[picture] = _rendered(drawing, layouts.get(picture))
                ending = "" if name == "light" else f"-{name}"
                write_whole(directory / f"{picture}{ending}.png", _png(whole))
                parts.setdefault(picture, {})[name] = panels or [whole]
                drawings[picture] = drawing
    return {
        picture: Picture(
            [
                _shot(dict(zip(by_theme, images, strict=True)), words)
                for *images, words in zip(*by_theme.values(), drawings[picture].words, strict=True)
            ],
            bool(drawings[picture].panels),
            drawings[picture].key,
        )
        for picture, by_theme in parts.items()
    }


def _rendered(drawing: Drawing, other: _Layout | None = None) -> _Rendered:
    """The figure without empty edges, and its panels: those of a figure have one size.

    Args:
        other: of the same figure in another theme, which has the letters' sizes too: to lay out
            every axis anew takes most of the time. It has no place of a title over all axes.
    """
    figure = drawing.figure
    canvas = FigureCanvasAgg(figure)
    if other is not None:
        figure.set_layout_engine("none")
        for axis, place in zip(figure.axes, other.places, strict=True):
            axis.set_position(place)
    canvas.draw()
    layout = other or _layout(drawing, canvas.get_renderer())
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    boxes = layout.panels
    size = [max((box[i + 2] - box[i] for box in boxes), default=0) for i in (0, 1)]
    # from the right and the bottom: there the axes of all panels end
    panels = [
        _cut(image, (box[2] - size[0], box[1], box[2], box[1] + size[1]), box) for box in boxes
    ]
    return _Rendered(_cut(image, layout.whole, layout.whole), panels, layout)


def _layout(drawing: Drawing, renderer: RendererAgg) -> _Layout:
    """Of a figure that has been drawn."""
    figure = drawing.figure
    return _Layout(
        [axis.get_position(original=True) for axis in figure.axes],
        [x * figure.dpi for x in figure.get_tightbbox(renderer).extents],
        [box.extents for axis in drawing.panels if (box := axis.get_tightbbox(renderer))],
    )


def _cut(image: Image.Image, frame: Sequence[float], box: Sequence[float]) -> Image.Image:
    """A frame, some room around it, of which the box within is the image and the rest ground. Both
    are matplotlib's, whose second axis goes up."""

    def pixels(x: Sequence[float]) -> tuple[int, int, int, int]:
        return round(x[0]), image.height - round(x[3]), round(x[2]), image.height - round(x[1])

    outer, inner = pixels(frame), pixels(box)
    inner = (
        max(inner[0], 0), max(inner[1], 0), min(inner[2], image.width), min(inner[3], image.height),
    )  # fmt: skip
    width, height = (outer[i + 2] - outer[i] + 2 * _PADDING for i in (0, 1))
    cut = Image.new("RGB", (width, height), image.getpixel((0, 0)))
    cut.paste(image.crop(inner), (inner[0] - outer[0] + _PADDING, inner[1] - outer[1] + _PADDING))
    return cut


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def _shot(images: Mapping[str, Image.Image], words: str) -> Shot:
    data = {name: base64.b64encode(_png(image)).decode() for name, image in images.items()}
    first = next(iter(images.values()))
    return Shot(data, first.width, first.height, words)
