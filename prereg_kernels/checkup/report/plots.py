# SPDX-License-Identifier: Apache-2.0
"""Curves over depth. They only read results; nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prereg_kernels.checkup.measures.measure import Measure, Panel
from prereg_kernels.checkup.measures.table import MEASURES, PANELS
from prereg_kernels.checkup.report.findings import middle_layer
from prereg_kernels.checkup.report.pictures import Drawing
from prereg_kernels.checkup.report.style import curve, legend, mark_layer, panels, plain
from prereg_kernels.checkup.results import CheckupResults
from prereg_kernels.checkup.words import figure as share
from prereg_kernels.checkup.words import over_depth

Colours = Mapping[str, str]
Models = Sequence[CheckupResults]

MARKERS = ("s", "o")
WIDTH, COLUMNS = 13.0, 5


def probes(models: Models, colours: Colours) -> Drawing | None:
    """Probe accuracy over depth, a panel a target; dotted: always the commonest class."""
    targets = list(dict.fromkeys(target for model in models for target in model.probes))
    if not targets:
        return None
    figure, axes = _panels(len(targets), height=2.5)
    for axis, target in zip(axes, targets, strict=True):
        for position, model in enumerate(models):
            if target in model.probes:
                _line(axis, models, position, target, colours, scale=100)
                chance = 100 * model.probes[target][0].chance
                axis.axhline(chance, color=colours["soft"], linestyle=":", linewidth=1)
        axis.set_title(plain(target))
        axis.yaxis.set_major_formatter(PercentFormatter())
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 0), min(high, 102))  # a t interval may leave what is possible
    axes[0].set_ylabel("probe accuracy")
    return _finish(figure, axes, models, [_probed(models, target) for target in targets])


def measures(picture: str, models: Models, colours: Colours) -> Drawing | None:
    """The panels of a picture, with the curves of all measures that are drawn there."""
    shown = {key: panel for key, panel in PANELS.items() if panel.picture == picture}
    curves = [measure for measure in MEASURES if measure.panel in shown]
    models = [m for m in models if any(measure.name in m.curves for measure in curves)]
    if not models:
        return None
    figure, axes = _panels(len(shown), height=2.6)
    words = []
    for axis, (key, panel) in zip(axes, shown.items(), strict=True):
        own = sorted((m for m in curves if m.panel == key), key=lambda measure: measure.dashed)
        for measure in own:
            line = "--" if measure.dashed else "-"
            for position, model in enumerate(models):
                if measure.name in model.curves:
                    _line(axis, models, position, measure.name, colours, measure.scale, line)
        axis.set_title(panel.title)
        axis.set_ylabel(panel.label)
        _limit(axis, panel, own, models)
        words.append(_measured(models, own))
    return _finish(figure, axes, models, words)


def _probed(models: Models, target: str) -> str:
    """A panel of probes in words."""
    parts = {}
    for model in models:
        if target in model.probes:
            chance = share(model.probes[target][0].chance, "%")
            curve = _over_depth(model, target, "%")
            parts[model.name] = f"{curve} (always the commonest class: {chance})"
    return _in_words(f"Probe of {target}", parts, models)


def _measured(models: Models, own: Sequence[Measure]) -> str:
    """A panel of measures in words."""
    names = " and ".join(measure.name for measure in own)
    parts = {
        model.name: "; ".join(
            f"{measure.name} " * (len(own) > 1) + _over_depth(model, measure.name, measure.unit)
            for measure in own
            if measure.name in model.curves
        )
        for model in models
    }
    return _in_words(names[:1].upper() + names[1:], parts, models)


def _over_depth(model: CheckupResults, key: str, unit: str) -> str:
    values = [estimate.value for estimate in model.curves[key]]
    return over_depth(values, middle_layer(model.layers), unit)


def _in_words(what: str, parts: Mapping[str, str], models: Models) -> str:
    named = [f"{name}: {text}" if len(models) > 1 else text for name, text in parts.items()]
    return f"{what}, over the layers. {'. '.join(named)}."


def _limit(axis: Axes, panel: Panel, own: Sequence[Measure], models: Models) -> None:
    values = [
        measure.scale * x.value
        for measure in own
        for model in models
        for x in model.curves.get(measure.name, ())
    ]
    if any(measure.unit == "%" for measure in own):
        axis.yaxis.set_major_formatter(PercentFormatter())
    if panel.wide and values and min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")
        return
    top = panel.top if panel.reach is None else max(panel.reach, 1.1 * max(values, default=0))
    if (panel.bottom, top) != (None, None):
        axis.set_ylim(panel.bottom, top)


CURVES: dict[str, Callable[[Models, Colours], Drawing | None]] = {
    "probes": probes,
    **{
        picture: partial(measures, picture)
        for picture in dict.fromkeys(panel.picture for panel in PANELS.values())
    },
}
"""{name of a picture: what draws it, or gives None where there is nothing to draw}."""


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    width = WIDTH if columns > 2 else 4.5 * columns
    rows = -(-count // columns)
    return panels(count, size=(width, height * rows + 0.4), columns=columns)


def _line(
    axis: Axes,
    models: Models,
    position: int,
    key: str,
    colours: Colours,
    scale: float = 1,
    linestyle: str = "-",
) -> None:
    estimates = models[position].curves[key]
    values, low, high = (
        scale * np.array([getattr(x, name) for x in estimates]) for name in ("value", "low", "high")
    )
    colour = colours["second"] if len(models) == 1 or position else colours["first"]
    curve(
        axis, values, low, high, color=colour, linestyle=linestyle, linewidth=1.8,
        marker=MARKERS[position] if len(values) <= 16 else None,
        label=str(position) if linestyle == "-" else None,
    )  # fmt: skip


def _finish(figure: Figure, axes: Sequence[Axes], models: Models, words: Sequence[str]) -> Drawing:
    layer = middle_layer(models[0].layers)
    for axis in axes:
        mark_layer(axis, layer, color=axis.yaxis.label.get_color(), alpha=0.14, linewidth=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(models) == 1:
        return Drawing(figure, words, axes)
    legend(figure, axes[0], lambda label: plain(models[int(label)].name), side="left")
    return Drawing(figure, words, axes, {models[0].name: "first", models[1].name: "second"})
