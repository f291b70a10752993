"""A sweep's pictures: the effect against each setting. They only read results."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prereg_kernels.checkup.report.style import BLUE, GREEN, GREY, STYLE
from prereg_kernels.demo.sweep.report import Column, SweepResults, answer_columns, probe_columns
from prereg_kernels.demo.sweep.sweep import AXES, CENTRE, Point, axis_points


def plot_sweep(results: SweepResults, directory: Path) -> dict[str, Path]:
    """A picture for each setting of which two values are finished; {axis: file}."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for axis in AXES:
        there = {point.name for point in results.settings}
        found = axis_points(results.config, axis)
        values = {value: point for value, point in found.items() if point.name in there}
        if len(values) < 2:
            continue
        with plt.rc_context(STYLE):
            figure = effects(results, axis, values)
            files[axis] = directory / f"{axis}.png"
            figure.savefig(files[axis])
            plt.close(figure)
    return files


def effects(results: SweepResults, axis: str, values: dict[object, Point]) -> Figure:
    """Differences to the baseline with their 95% intervals, over the values of one setting."""
    answers = answer_columns(list(results.config.experiment.run.families))
    probes = probe_columns(results.last)
    panels = [
        ("answers, mean (points)", answers[:1]),
        ("LM loss (nats)", answers[-1:]),
        ("probes of what is never asked (points)", probes[:2]),
        ("probe of the digit, asked (points)", probes[2:]),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.3), constrained_layout=True)
    for panel, (title, columns) in zip(axes, panels, strict=True):
        _panel(panel, results, axis, values, columns)
        panel.set_title(title, fontsize=10)
    handles, labels = axes[2].get_legend_handles_labels()
    short = [label.partition(", ")[2] for label in labels]
    figure.legend(handles, short, loc="outside upper center", ncols=2, frameon=False)
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
        found = [results.effect(p, column.measure(results.layer(p))) for p in values.values()]
        panel.errorbar(
            [x + 0.12 * position for x in range(len(values))],
            [column.scale * effect.difference.mean for effect in found],
            yerr=[column.scale * effect.half_width for effect in found],
            color=colour, marker="os"[position], markersize=5, capsize=3, linewidth=1.2,
            linestyle="none" if axis == "anchors" else "-", label=column.heading,
        )  # fmt: skip
    points = [point.name for point in values.values()]
    if CENTRE in points:
        panel.axvline(points.index(CENTRE), color=GREY, alpha=0.15, linewidth=8)
    panel.set_xticks(range(len(values)), names)
    panel.set_xlabel(AXES[axis])
