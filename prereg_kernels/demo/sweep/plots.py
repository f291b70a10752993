# SPDX-License-Identifier: Apache-2.0
"""A sweep's pictures: the effect against each setting. They only read results."""

from __future__ import annotations

import math
import statistics
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from prereg_kernels.checkup.report.style import BLUE, GREEN, GREY, ORANGE, STYLE, legend, panels
from prereg_kernels.demo.config import CONTROLS, TRAINED
from prereg_kernels.demo.experiment.summary import learned, over_seeds
from prereg_kernels.demo.sweep.report import (
    Column,
    SweepResults,
    answer_columns,
    curve_columns,
    curve_points,
    probe_columns,
    transfer_columns,
)
from prereg_kernels.demo.sweep.sweep import AXES, BASELINE, CENTRE, Point, axis_points


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
    with matplotlib.rc_context(STYLE):
        drawn = {}
        if curve_points(results):
            drawn["curve"] = learning_curve(results)
        if results.config.transfer:
            drawn["trade"] = trade(results)
        for name, figure in drawn.items():
            files[name] = directory / f"{name}.png"
            figure.savefig(files[name])
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
    transfer = transfer_columns(results.config)
    if transfer:
        shown.append(("new questions, learned afterwards (points)", transfer))
    figure, axes = panels(len(shown), size=(3.75 * len(shown), 3.3))
    for panel, (title, columns) in zip(axes, shown, strict=True):
        _panel(panel, results, axis, values, columns)
        panel.set_title(title, fontsize=10)
    legend(figure, axes[2], lambda label: label.partition(", ")[2])
    if transfer:  # its lines are others than those of the probes
        axes[-1].legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("PRe - baseline")
    return figure


def learning_curve(results: SweepResults) -> Figure:
    """Right answers to new kinds of question over the number of scenes that they are learned from,
    a line a setting: the mean over the seeds that it shares with the baseline, and its 95% t
    interval."""
    columns = curve_columns(results.config)
    counts = [int(column.heading.split()[0]) for column in columns]
    figure, [axis] = panels(1, size=(7, 4.4))
    looks = cycle(zip((ORANGE, BLUE, GREEN, GREY), "sod^", strict=True))
    for point, (colour, marker) in zip(curve_points(results), looks, strict=False):
        runs = list(results.by_point[point.name].values())
        levels = [over_seeds([column.measure(0)(run) for run in runs]) for column in columns]
        half = float(t.ppf(0.975, len(runs) - 1)) / math.sqrt(len(runs)) if len(runs) > 1 else 0.0
        axis.errorbar(
            counts,
            [100 * level.value for level in levels],
            yerr=[100 * half * level.deviation if half else 0.0 for level in levels],
            color=colour, marker=marker, markersize=5, capsize=3, label=_described(point),
        )  # fmt: skip
    first = results.config.experiment.transfer.frozen[0]
    baseline = results.by_point[BASELINE].values()
    chance = [learned(first, n, "majority")(run) for n in counts for run in baseline]
    axis.axhline(100 * statistics.fmean(chance), color="black", linestyle=":", linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel("scenes that the new questions are learned from")
    axis.set_ylabel("right answers (%)")
    axis.set_title(f"new kinds of question, learned afterwards, {TRAINED[first]}", fontsize=10)
    axis.legend(loc="upper left", frameon=False)
    return figure


def trade(results: SweepResults) -> Figure:
    """What each setting gives and takes: new questions learned against common questions answered,
    both as differences to the baseline with their 95% intervals."""
    [gain, *_], cost = transfer_columns(results.config), answer_columns([])[0]
    figure, [axis] = panels(1, size=(9, 5))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    named = []
    for point in results.settings:
        if point.long_tail:
            continue
        x, y = (
            results.effect(point, column.measure(results.layer(point))).difference
            for column in (cost, gain)
        )
        wrong = point.pre is not None and point.pre.anchor in CONTROLS.values()
        colour = BLUE if point.name == CENTRE else GREY if wrong else GREEN
        axis.errorbar(
            100 * x.value, 100 * y.value, xerr=100 * x.half_width, yerr=100 * y.half_width,
            color=colour, marker="o", markersize=5, linewidth=0.8, alpha=0.9,
        )  # fmt: skip
        named.append((100 * y.value, 100 * x.value, _described(point)))
    _name_at_the_right(axis, named)
    axis.set_xlabel("common questions: PRe - baseline (points)")
    axis.set_ylabel("new questions learned: PRe - baseline (points)")
    axis.set_title(f"what a setting gives and takes ({gain.heading})", fontsize=10)
    return figure


def _name_at_the_right(axis: Axes, named: list[tuple[float, float, str]]) -> None:
    """Names of points (y, x, name) in a column beside the panel, a line to each: points may be
    close to each other."""
    least = 0.05  # of the panel's height, from one to the next
    low, high = axis.get_ylim()
    top = 1.0
    for y, x, name in sorted(named, reverse=True):
        top = min(top, (y - low) / (high - low))
        axis.annotate(
            name, (x, y), xytext=(1.02, top), textcoords="axes fraction", fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "relpos": (0, 0.5)},
        )  # fmt: skip
        top -= least


def _described(point: Point) -> str:
    """A setting by what it is, not by how it is called in a sweep."""
    if point.pre is None:
        return "baseline"
    if point.name == CENTRE:
        return f"PRe, weight {point.pre.weight:g}, layer {point.pre.layer}, {point.pre.anchor}"
    if point.pre.anchor in CONTROLS.values():
        return "control: another scene's target"
    return point.name


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
