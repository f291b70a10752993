"""A sweep's pictures: the effect against each setting. They only read results."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prereg_kernels.checkup.report.style import BLUE, GREEN, GREY, STYLE, legend, panels
from prereg_kernels.demo.sweep.report import Column, SweepResults, answer_columns, probe_columns
from prereg_kernels.demo.sweep.sweep import AXES, CENTRE, Point, axis_points


def plot_sweep(results: SweepResults, directory: Path) -> dict[str, Path]:
    """A picture for each setting of which two values are finished; {axis: file}."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for axis in AXES:
        there = {point.name for point in results.settings}
        settings = axis_points(results.config, axis)
        values = {value: point for value, point in settings.items() if point.name in there}
        if len(values) < 2:
            continue
        with matplotlib.rc_context(STYLE):
            figure = effects(results, axis, values)
            files[axis] = directory / f"{axis}.png"
            figure.savefig(files[axis])
    return files


def effects(results: SweepResults, axis: str, values: dict[object, Point]) -> Figure:
    """Differences to the baseline with their 95% intervals, over the values of one setting."""
    answers = answer_columns(list(results.config.experiment.run.families))
    probes = probe_columns(results.last)
    shown = [
        ("answers, mean (points)", answers[:1]),
        ("LM loss (nats)", answers[-1:]),
        ("probes of what is never asked (points)", probes[:2]),
        ("probe of the digit, asked (points)", probes[2:]),
    ]
    figure, axes = panels(len(shown), size=(15, 3.3))
    for panel, (title, columns) in zip(axes, shown, strict=True):
        _panel(panel, results, axis, values, columns)
        panel.set_title(title, fontsize=10)
    legend(figure, axes[2], lambda label: label.partition(", ")[2])
    axes[0].set_ylabel("PRe - baseline")
    return figure


def _panel(
    panel: Axes,
    results: SweepResults,
    axis: str,
    values: dict[object, Point],
    columns: list[Column],
) -> None:
    names = [str(value) if axis == "anchors" else f"{value:g}" for value in values]
    panel.axhline(0, color="black", linewidth=0.8)
    for position, (column, colour) in enumerate(zip(columns, (BLUE, GREEN), strict=False)):
        changes = [results.effect(p, column.measure(results.layer(p))) for p in values.values()]
        panel.errorbar(
            [x + 0.12 * position for x in range(len(values))],
            [column.scale * effect.difference.value for effect in changes],
            yerr=[column.scale * effect.difference.half_width for effect in changes],
            color=colour, marker="os"[position], markersize=5, capsize=3, linewidth=1.2,
            linestyle="none" if axis == "anchors" else "-", label=column.heading,
        )  # fmt: skip
    points = [point.name for point in values.values()]
    if CENTRE in points:
        panel.axvline(points.index(CENTRE), color=GREY, alpha=0.15, linewidth=8)
    panel.set_xticks(range(len(values)), names)
    panel.set_xlabel(AXES[axis])
