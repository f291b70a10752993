# SPDX-License-Identifier: Apache-2.0
"""The experiment's report: tables on the terminal, summary.json, and one HTML page."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from prereg_kernels._util.files import write_whole
from prereg_kernels._util.settings_file import to_dict
from prereg_kernels._version import __version__
from prereg_kernels.checkup.intervals import Estimate
from prereg_kernels.checkup.report.html import write_html
from prereg_kernels.checkup.words import plus_minus, spread
from prereg_kernels.demo.config import TRAINED
from prereg_kernels.demo.data.scenes import PROPERTIES
from prereg_kernels.demo.experiment.experiment import VARIANTS, ExperimentConfig, units
from prereg_kernels.demo.experiment.plots import plot_all
from prereg_kernels.demo.experiment.results import read_result
from prereg_kernels.demo.experiment.summary import (
    Effect,
    Result,
    Results,
    at,
    headline,
    learned,
    over_seeds,
    unasked,
)


@dataclass(frozen=True)
class Table:
    """A table: cells are text already."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    config: ExperimentConfig, cost: dict[str, Any], took: str, out: Path, console: Console
) -> Path:
    """Print the tables; write report.html, summary.json and plots/ into `out`.

    Args:
        cost: from `measure_cost`. took: how long all of it, for people.

    Returns:
        The page.
    """
    stored = [read_result(unit.directory(out)) for unit in units(config)]
    finished = [result for result in stored if result is not None]
    results = Results(finished)
    layer = config.run.pre.layer
    sentences = headline(results, layer)
    tables = [
        _answers(results),
        _probes(results, layer),
        _structure(results, layer),
        _transfer(results),
        _cost(cost),
    ]
    pre = config.run.pre
    facts = {
        "seeds": len(results.seeds),
        "steps": config.run.steps,
        "scenes a step": config.run.micro_batch * config.run.accumulation,
        "PRe": f"layer {layer} of {config.run.model.decoder_layers}, weight {pre.weight:g}, "
        f"anchor {pre.anchor}",
        "took": took,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        + (f", {torch.cuda.get_device_name()}" if config.device.startswith("cuda") else ""),
        "prereg_kernels": __version__,
    }
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False)
    for table in tables:
        _print(table, console)
    pictures = plot_all(results, config, out, out / "plots")
    summary = {
        "headline": sentences,
        "facts": facts,
        "tables": [table.__dict__ for table in tables],
        "cost": cost,
        "config": to_dict(config),
        "results": finished,
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    values = {
        "headline": sentences,
        "facts": facts,
        "tables": {table.title: table for table in tables},
        "pictures": pictures,
        "config": json.dumps(to_dict(config), indent=1),
    }
    path = out / "report.html"
    write_html(path, __package__, values)
    return path


def _answers(results: Results) -> Table:
    rows = [_percent_row(family, results, at("accuracy", family)) for family in results.families]
    rows.append(_percent_row("mean", results, at("mean_accuracy")))
    rows.append(_row("LM loss (nats)", results, at("lm_loss"), 1, ".3f"))
    return Table("Answers (%)", ("", "baseline", "PRe", "control", "PRe − baseline"), rows)


def _probes(results: Results, layer: int) -> Table:
    rows = []
    for depth in dict.fromkeys((0, layer, results.layers - 1)):
        for name in PROPERTIES:
            label = f"layer {depth}: {name}" + (" (asked)" if name == "digit" else "")
            rows.append(_percent_row(label, results, at("probe", name, depth)))
        rows.append(_percent_row(f"layer {depth}: mean of the unasked", results, unasked(depth)))
    columns = ("", "baseline", "PRe", "control", "PRe − baseline")
    return Table("Linear probes at the visual tokens (%)", columns, rows)


def _structure(results: Results, layer: int) -> Table:
    rows = []
    for depth in dict.fromkeys((0, layer, results.layers - 1)):
        for measure in results.measures():
            get = at(measure.group, measure.name, depth)
            label = f"layer {depth}: {measure.name}"
            rows.append(_row(label, results, get, measure.scale, measure.digits))
    columns = ("", "baseline", "PRe", "control", "PRe − baseline")
    return Table("Patch structure", columns, rows)


def _transfer(results: Results) -> Table:
    rows = []
    for frozen, scenes in results.transfers:
        get = learned(frozen, scenes)
        levels = []
        for variant in VARIANTS:
            values = results.values(variant, get)
            each = ", ".join(f"{100 * value:.1f}" for value in values)
            levels.append(f"{_level(over_seeds(values), 100, '.1f')} ({each})")
        name = f"{scenes} scenes, {TRAINED[frozen]}"
        rows.append([name, *levels, _difference(results.effect(get), 100, ".1f")])
    families = ", ".join(results.new_families)
    columns = ("", "baseline (per seed)", "PRe (per seed)", "control (per seed)", "PRe − baseline")
    return Table(f"Transfer: {families} questions, learned afterwards (%)", columns, rows)


def _cost(cost: dict[str, Any]) -> Table:
    seconds, peaks = cost["step_seconds"], cost["peak_bytes"]
    extra = (peaks["pre"] - peaks["baseline"]) / 2**20
    rows = [
        [
            "training step (ms)",
            f"{1e3 * seconds['baseline']:.1f}",
            # by the paired ratio, which both steps' luck does not move; the medians apart are
            f"{1e3 * seconds['baseline'] * cost['step_ratio']:.1f}",
            f"{100 * (cost['step_ratio'] - 1):+.1f}% "
            f"± {100 * cost['step_ratio_error']:.1f}% (standard error, {cost['steps']} pairs)",
        ],
        [
            f"peak memory of the {'process' if cost['device'] == 'cpu' else 'device'} (MiB)",
            f"{peaks['baseline'] / 2**20:.0f}",
            f"{peaks['pre'] / 2**20:.0f}",
            f"{extra:+.0f} MiB",
        ],
    ]
    return Table("Cost on this machine, one thread", ("", "baseline", "PRe", "difference"), rows)


def _percent_row(label: str, results: Results, get: Callable[[Result], float]) -> list[str]:
    return _row(label, results, get, 100, ".1f")


def _row(
    label: str, results: Results, get: Callable[[Result], float], scale: float, digits: str
) -> list[str]:
    """A row of the columns baseline, PRe, control, difference."""
    effect = results.effect(get)
    control = over_seeds(results.values("other_scene", get))
    levels = [_level(x, scale, digits) for x in (effect.before, effect.after, control)]
    return [label, *levels, _difference(effect, scale, digits)]


def _level(x: Estimate, scale: float, digits: str) -> str:
    return f"{scale * x.value:{digits}}{spread(scale * x.deviation, digits)}"


def _difference(effect: Effect, scale: float, digits: str) -> str:
    """The paired difference with its 95% interval; a star where the interval excludes 0."""
    star = " *" if effect.difference.direction else ""
    return plus_minus(effect.difference, scale, digits) + star


def _print(table: Table, console: Console) -> None:
    shown = RichTable(title=table.title, title_justify="left")
    for position, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if position == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)
