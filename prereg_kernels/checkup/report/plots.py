"""Curves over depth. They only read results; nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prereg_kernels.checkup.report.findings import middle_layer
from prereg_kernels.checkup.report.style import plain
from prereg_kernels.checkup.results import Diagnosis

Colours = Mapping[str, str]

MARKERS = ("s", "o")


def probes(found: Sequence[Diagnosis], colours: Colours) -> Figure | None:
    """Probe accuracy over depth, a panel a target; dotted: always the commonest class."""
    targets = list(dict.fromkeys(target for d in found for target in d.probes))
    if not targets:
        return None
    columns = min(5, len(targets))
    figure, axes = _panels(columns, -(-len(targets) // columns), height=2.5)
    for axis, target in zip(axes, targets, strict=False):
        for position, diagnosis in enumerate(found):
            if target in diagnosis.probes:
                _line(axis, diagnosis, target, position, found, colours, scale=100)
                chance = 100 * diagnosis.probes[target][0].chance
                axis.axhline(chance, color=colours["soft"], linestyle=":", linewidth=1)
        axis.set_title(plain(target))
        _percent(axis)
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 0), min(high, 102))  # a t interval may leave what is possible
    axes[0].set_ylabel("probe accuracy")
    for axis in axes[len(targets) :]:
        axis.set_axis_off()
    _finish(figure, axes[: len(targets)], found)
    return figure


def structure(found: Sequence[Diagnosis], colours: Colours) -> Figure | None:
    """Cohesion, coupling, contrast and difference over depth."""
    found = [diagnosis for diagnosis in found if "contrast" in diagnosis.curves]
    if not found:
        return None
    figure, axes = _panels(5, 1)
    pairs = (("cohesion", "-"), ("coupling", "--"))
    for axis, prefix, title in (
        (axes[0], "", "cohesion —, coupling - -"),
        (axes[3], "centred ", "the same, centred"),
    ):
        for position, diagnosis in enumerate(found):
            for key, dashes in pairs:
                _line(axis, diagnosis, prefix + key, position, found, colours, linestyle=dashes)
        axis.set_title(title)
    for axis, key, title in (
        (axes[1], "contrast", "contrast"),
        (axes[2], "difference", "difference"),
        (axes[4], "centred difference", "difference, centred"),
    ):
        for position, diagnosis in enumerate(found):
            _line(axis, diagnosis, key, position, found, colours)
        axis.set_title(title)
    axes[0].set_ylabel("mean cosine similarity")
    axes[1].set_ylabel("cohesion / coupling")
    axes[2].set_ylabel("cohesion − coupling")
    _finish(figure, axes, found)
    return figure


def resemblance(found: Sequence[Diagnosis], colours: Colours) -> Figure:
    """What is left of the input, and over how many directions the features spread."""
    figure, axes = _panels(4, 1)
    for axis, key, title, unit in (
        (
            axes[0],
            "debiased CKA with input",
            "CKA: debiased —, plain - -",
            "1 = unchanged",
        ),
        (axes[1], "cosine to input", "cosine to the input", "mean cosine"),
        (axes[2], "effective dimension", "effective dimension", "directions"),
        (axes[3], "mean correlation", "correlation of dimensions", "mean |r|"),
    ):
        for position, diagnosis in enumerate(found):
            _line(axis, diagnosis, key, position, found, colours)
        axis.set_title(title)
        axis.set_ylabel(unit)
    for position, diagnosis in enumerate(found):
        _line(axes[0], diagnosis, "CKA with input", position, found, colours, linestyle="--")
    axes[0].set_ylim(top=1.03)
    axes[1].set_ylim(top=1.03)
    axes[2].set_ylim(bottom=0)
    axes[3].set_ylim(bottom=0)
    _finish(figure, axes, found)
    return figure


def tokens(found: Sequence[Diagnosis], colours: Colours) -> Figure:
    """Silenced tokens, norms and massive activations."""
    figure, axes = _panels(4, 1)
    for axis, key, title, scale in (
        (axes[0], "silenced tokens", "silenced tokens", 100),
        (axes[1], "entropy of top tokens", "variety of top tokens", 1),
        (axes[2], "median norm", "norm", 1),
        (axes[3], "massive activations", "massive activations", 100),
    ):
        for position, diagnosis in enumerate(found):
            _line(axis, diagnosis, key, position, found, colours, scale=scale)
        axis.set_title(title)
    _percent(axes[0], top=102)
    axes[0].set_ylabel("share of visual tokens")
    axes[1].set_ylabel("bits")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylabel("median length")
    norms = [x.value for d in found for x in d.curves["median norm"]]
    if min(norms) > 0 and max(norms) > 20 * min(norms):
        axes[2].set_yscale("log")
    else:
        axes[2].set_ylim(bottom=0)
    _percent(axes[3])
    top = max(100 * x.value for d in found for x in d.curves["massive activations"])
    axes[3].set_ylim(0, max(1.0, 1.1 * top))
    axes[3].set_ylabel("share of visual tokens")
    _finish(figure, axes, found)
    return figure


CURVES: dict[str, Callable[[Sequence[Diagnosis], Colours], Figure | None]] = {
    "probes": probes,
    "structure": structure,
    "resemblance": resemblance,
    "tokens": tokens,
}
"""{name of a picture: what draws it, or gives None where there is nothing to draw}."""


def _panels(columns: int, rows: int, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    width = 13 if columns > 2 else 4.5 * columns
    figure = Figure(figsize=(width, height * rows + 0.4), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _line(
    axis: Axes,
    diagnosis: Diagnosis,
    key: str,
    position: int,
    found: Sequence[Diagnosis],
    colours: Colours,
    *,
    scale: float = 1,
    linestyle: str = "-",
) -> None:
    curve = diagnosis.curves[key]
    values, low, high = (
        scale * np.array([getattr(x, name) for x in curve]) for name in ("value", "low", "high")
    )
    colour = colours["second"] if len(found) == 1 or position else colours["first"]
    depth = np.arange(len(values))
    axis.plot(
        depth,
        values,
        color=colour,
        linestyle=linestyle,
        linewidth=1.8,
        marker=MARKERS[position] if len(values) <= 16 else None,
        markersize=4,
        label=str(position) if linestyle == "-" else None,
    )
    axis.fill_between(depth, low, high, color=colour, alpha=0.18, linewidth=0)


def _percent(axis: Axes, top: float | None = None) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter())
    if top is not None:
        axis.set_ylim(0, top)


def _finish(figure: Figure, axes: Sequence[Axes], found: Sequence[Diagnosis]) -> None:
    layer = middle_layer(found[0].layers)
    for axis in axes:
        axis.axvline(layer, color=axis.yaxis.label.get_color(), alpha=0.14, linewidth=7)
        axis.set_xlabel("layer (0: input)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(found) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        legend = figure.legend(
            handles, labels, loc="outside upper left", ncols=len(labels), frameon=False
        )
        for text, position in zip(legend.get_texts(), labels, strict=True):
            # not as a label: matplotlib leaves out those that begin with an underscore
            text.set_text(plain(found[int(position)].name))
