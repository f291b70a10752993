# SPDX-License-Identifier: Apache-2.0
"""How every picture of this package looks: colours, light and dark, axes over depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from prereg_kernels._util.files import printable

# Okabe and Ito's colours, told apart with every kind of colour vision
ORANGE, BLUE, GREEN, GREY = "#E69F00", "#0072B2", "#009E73", "#7F7F7F"
SKY = "#56B4E9"  # instead of the blue, on dark ground

STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "font.size": 10,
}

THEMES = {
    "light": {
        "ground": "#ffffff", "ink": "#1b1f24", "soft": "#59636e", "line": "#d1d9e0",
        "card": "#f6f8fa", "fall": "#b35900", "rise": "#0072b2",
        "first": ORANGE, "second": BLUE, "third": GREY,
    },
    "dark": {
        "ground": "#0d1117", "ink": "#e6edf3", "soft": "#9198a1", "line": "#3d444d",
        "card": "#151b23", "fall": "#f0b13c", "rise": "#56b4e9",
        "first": ORANGE, "second": SKY, "third": GREY,
    },
}  # fmt: skip
"""The colours of pictures and pages, by theme; first, second, third: of what is compared."""


def plain(text: str) -> str:
    """A name from outside as matplotlib draws it letter for letter: dollars are no formulas."""
    return printable(text).replace("$", r"\$")


@contextmanager
def theme(name: str) -> Iterator[dict[str, str]]:
    """Draw in a theme of the page, "light" or "dark"; gives its colours."""
    colours = THEMES[name]
    settings = {
        "figure.facecolor": colours["ground"],
        "savefig.facecolor": colours["ground"],
        "axes.facecolor": colours["ground"],
        "text.color": colours["ink"],
        "axes.labelcolor": colours["soft"],
        "axes.titlecolor": colours["ink"],
        "axes.edgecolor": colours["line"],
        "xtick.color": colours["soft"],
        "ytick.color": colours["soft"],
        "grid.color": colours["soft"],
        "legend.labelcolor": colours["ink"],
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.spines.left": False,
    }
    with matplotlib.rc_context({**STYLE, **settings}):
        yield colours


def panels(
    count: int, *, size: tuple[float, float], columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with that many axes, row by row; what is left of the last row stays empty.

    Args:
        size: width and height, inches.
        columns: at most; None: one row.
    """
    columns = min(columns or count, count)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def curve(axis: Axes, values: ArrayLike, low: ArrayLike, high: ArrayLike, **line: Any) -> None:
    """A line over depth, and the band between two more; `line` is what `Axes.plot` takes."""
    depth = np.arange(len(np.asarray(values)))
    axis.plot(depth, values, markersize=4, **line)
    axis.fill_between(depth, low, high, color=line["color"], alpha=0.18, linewidth=0)


def mark_layer(axis: Axes, layer: int, **bar: Any) -> None:
    """Name the axis of depth, and put a bar at a layer."""
    axis.axvline(layer, **bar)
    axis.set_xlabel("layer (0: input)")


def legend(
    figure: Figure, axis: Axes, text: Callable[[str], str] = str, side: str = "center"
) -> None:
    """One for all axes, above them, of the lines of one.

    Args:
        text: from a line's label to what is shown.
    """
    handles, labels = axis.get_legend_handles_labels()
    shown = figure.legend(
        handles, labels, loc=f"outside upper {side}", ncols=len(labels), frameon=False
    )
    for entry, label in zip(shown.get_texts(), labels, strict=True):
        # not as a label: matplotlib leaves out those that begin with an underscore
        entry.set_text(text(label))
