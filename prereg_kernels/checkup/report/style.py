"""How every picture of this package looks: colours, light and dark, axes over depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

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

_THEMES = {
    "light": {"ground": "#ffffff", "ink": "#1b1f24", "soft": "#59636e", "line": "#d1d9e0"},
    "dark": {"ground": "#0d1117", "ink": "#e6edf3", "soft": "#9198a1", "line": "#3d444d"},
}
THEMES = tuple(_THEMES)


def plain(text: str) -> str:
    """A name from outside as matplotlib draws it letter for letter: dollars are no formulas."""
    return printable(text).replace("$", r"\$")


@contextmanager
def theme(name: str) -> Iterator[dict[str, str]]:
    """Draw in a theme of the page, "light" or "dark"; gives its colours."""
    colours = _THEMES[name]
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
    models = [ORANGE, BLUE if name == "light" else SKY]
    with matplotlib.rc_context({**STYLE, **settings}):
        yield {**colours, "first": models[0], "second": models[1]}
