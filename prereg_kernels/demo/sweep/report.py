# SPDX-License-Identifier: Apache-2.0
"""What a sweep found: every setting against its baseline, as JSON, a Markdown page and plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prereg_kernels._util.files import write_whole
from prereg_kernels._util.machine import describe_machine
from prereg_kernels._util.settings_file import to_dict
from prereg_kernels.checkup.measures.measure import SWEEP, Measure
from prereg_kernels.checkup.words import plus_minus
from prereg_kernels.demo.config import TRAINED
from prereg_kernels.demo.experiment.summary import (
    Effect,
    Result,
    at,
    holm,
    learned,
    measures_in,
    unasked,
)
from prereg_kernels.demo.sweep.sweep import (
    BASELINE,
    LONG_TAIL,
    LONG_TAIL_BASELINE,
    Point,
    SweepConfig,
    finished,
    points,
    stamps,
)

Get = Callable[[Result], float]


@dataclass(frozen=True)
class Column:
    """Something measured: its heading, how it is read from a result given the setting's layer, and
    how it is printed."""

    heading: str
    measure: Callable[[int], Get]
    scale: float = 100
    digits: str = ".1f"


def _fixed(get: Get) -> Callable[[int], Get]:
    return lambda layer: get


def answer_columns(families: list[str]) -> list[Column]:
    """Answers: the families' mean, each of them, and the loss."""
    return [
        Column("answers, mean", _fixed(at("mean_accuracy"))),
        *(Column(family, _fixed(at("accuracy", family))) for family in families),
        Column("LM loss (nats)", _fixed(at("lm_loss")), 1, ".3f"),
    ]


def probe_columns(last: int) -> list[Column]:
    """Linear probes at the setting's own layer and at the last."""
    return [
        Column("unasked, its layer", unasked),
        Column(f"unasked, layer {last}", _fixed(unasked(last))),
        Column("digit, its layer", lambda layer: at("probe", "digit", layer)),
        Column(f"digit, layer {last}", _fixed(at("probe", "digit", last))),
    ]


def transfer_columns(config: SweepConfig) -> list[Column]:
    """What was learned afterwards, for each part that stayed frozen; none without that test."""
    if not config.transfer:
        return []
    test = config.experiment.transfer
    return [Column(TRAINED[frozen], _fixed(learned(frozen, test.scenes))) for frozen in test.frozen]


def curve_points(results: SweepResults) -> list[Point]:
    """The baseline and the settings whose runs all have the learning curve; none where the
    baseline's have not."""
    config = results.config
    frozen, counts = config.experiment.transfer.frozen[0], set(map(str, config.curve_scenes))
    shown = [
        point
        for point in (*results.baselines, *results.settings)
        if counts
        and all(
            counts <= run.get("transfer", {}).get(frozen, {}).keys()
            for run in results.by_point[point.name].values()
        )
    ]
    return shown if any(point.name == BASELINE for point in shown) else []


def curve_columns(config: SweepConfig) -> list[Column]:
    """What was learned afterwards from so many scenes, ascending."""
    test = config.experiment.transfer
    frozen = test.frozen[0]
    counts = set(config.curve_scenes)
    if config.transfer and test.scenes is not None:
        counts.add(test.scenes)
    return [Column(f"{count} scenes", _fixed(learned(frozen, count))) for count in sorted(counts)]


def measure_columns(results: SweepResults) -> list[Column]:
    """The sweep's part of the table of measures, at the setting's own layer."""

    def column(measure: Measure) -> Column:
        def read(layer: int) -> Get:
            return at(measure.group, measure.name, layer)

        return Column(measure.name, read, measure.scale, measure.digits)

    runs = (run for point in results.by_point.values() for run in point.values())
    return [column(measure) for measure in measures_in(runs, SWEEP)]


class SweepResults:
    """The finished runs of a sweep, by setting.

    A setting is compared with its baseline over the seeds that both have.
    """

    def __init__(self, config: SweepConfig, results: list[Result]) -> None:
        self.config = config
        self.by_point: dict[str, dict[int, Result]] = {}
        for result in results:
            self.by_point.setdefault(result["point"], {})[result["seed"]] = result
        have = self.by_point
        self.baselines = [p for p in points(config) if p.name in have and p.name == p.baseline]
        self.settings = [
            p
            for p in points(config)
            if p.name != p.baseline
            and have.get(p.name, {}).keys() & have.get(p.baseline, {}).keys()
        ]

    def effect(self, point: Point, get: Get) -> Effect:
        """The setting against its baseline."""
        before, after = self.by_point[point.baseline], self.by_point[point.name]
        seeds = sorted(before.keys() & after.keys())
        return Effect.of([get(before[s]) for s in seeds], [get(after[s]) for s in seeds])

    def seeds(self, point: Point) -> int:
        """How many seeds the setting and its baseline have in common."""
        return len(self.by_point[point.baseline].keys() & self.by_point[point.name].keys())

    def layer(self, point: Point) -> int:
        """The setting's regularised layer; for a baseline the centre's."""
        return (point.pre or self.config.experiment.run.pre).layer

    @property
    def last(self) -> int:
        """The last layer."""
        return self.config.experiment.run.model.decoder_layers

    def families(self, point: Point) -> list[str]:
        """The question families that were asked."""
        return list(next(iter(self.by_point[point.name].values()))["accuracy"])


@dataclass(frozen=True)
class SweepTable:
    """A row a setting, of its difference to the baseline; the baselines' rows are plain levels."""

    title: str
    columns: list[Column]
    baselines: list[Point]
    settings: list[Point]


def tables(results: SweepResults) -> list[SweepTable]:
    """All tables: the common mix's answers, probes and structure, then the long tail's answers."""
    common = [p for p in results.settings if not p.long_tail]
    own = [p for p in results.baselines if p.name == BASELINE]
    shown = []
    for title, columns in (
        ("Answers (%)", answer_columns(results.families(own[0]))),
        ("Linear probes at the visual tokens (%)", probe_columns(results.last)),
        ("Patch structure at the setting's layer", measure_columns(results)),
    ):
        shown.append(SweepTable(title, columns, own, common))
    test = results.config.experiment.transfer
    families = ", ".join(test.families)
    if results.config.transfer:
        title = f"New questions ({families}), learned afterwards from {test.scenes} scenes (%)"
        shown.append(SweepTable(title, transfer_columns(results.config), own, common))
    with_curve = curve_points(results)[1:]  # behind the baseline
    if with_curve:
        title = f"New questions, learned afterwards, {TRAINED[test.frozen[0]]} (%)"
        shown.append(SweepTable(title, curve_columns(results.config), own, with_curve))
    tail = [p for p in results.settings if p.name == LONG_TAIL]
    if tail:
        columns = answer_columns(results.families(tail[0]))
        base = [p for p in results.baselines if p.name == LONG_TAIL_BASELINE]
        shown.append(SweepTable("Answers after a long-tailed mix (%)", columns, base, tail))
    return shown


def markdown(results: SweepResults, stamps: list[dict[str, Any]]) -> str:
    """All tables, and what their marks mean."""
    shown = tables(results)
    cells = [(t, p, c) for t in shown for p in t.settings for c in t.columns]
    effects = [results.effect(p, c.measure(results.layer(p))) for _, p, c in cells]
    holds = holm([effect.p_value for effect in effects])
    marked = {
        (table.title, point.name, column.heading): _difference(effect, column, sure)
        for (table, point, column), effect, sure in zip(cells, effects, holds, strict=True)
    }
    lines = []
    for table in shown:
        lines += [
            f"**{table.title}**\n",
            "| | seeds | " + " | ".join(column.heading for column in table.columns) + " |",
            "|---" * (2 + len(table.columns)) + "|",
        ]
        for point in table.baselines:
            runs = results.by_point[point.name].values()
            levels = []
            for column in table.columns:
                values = [column.measure(results.layer(point))(run) for run in runs]
                levels.append(f"{column.scale * sum(values) / len(values):{column.digits}}")
            lines.append(f"| {point.name} | {len(runs)} | " + " | ".join(levels) + " |")
        for point in table.settings:
            row = [marked[table.title, point.name, column.heading] for column in table.columns]
            lines.append(f"| {point.name} | {results.seeds(point)} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join([*lines, _foot(results, effects, holds, stamps)])


def _difference(effect: Effect, column: Column, sure: bool) -> str:
    scale, digits = column.scale, column.digits
    mark = " **" if sure else " *" if effect.difference.direction else ""
    return plus_minus(effect.difference, scale, digits) + mark.replace("*", chr(92) + "*")


def _foot(
    results: SweepResults, effects: list[Effect], holds: list[bool], stamps: list[dict[str, Any]]
) -> str:
    pre = results.config.experiment.run.pre
    there = {point.name for point in (*results.baselines, *results.settings)}
    missing = [point.name for point in points(results.config) if point.name not in there]
    clear = sum(effect.difference.direction != 0 for effect in effects)
    star = "\\*"
    commits = sorted({f"{s['commit']}{' (dirty)' * bool(s['dirty'])}" for s in stamps})
    devices = sorted({s["device"] for s in stamps})
    return (
        "The first row of a table has levels, the others differences to it, paired by seed, and "
        "half their 95% t interval; 'its layer' is the setting's, for the level the centre's. "
        f"Centre: weight {pre.weight:g}, layer {pre.layer}, anchor {pre.anchor}, token_fraction "
        f"{pre.token_fraction:g}; the other rows differ from it in what they say. {star}: the "
        f"interval excludes 0, as {clear} of the {len(effects)} do; without any effect about "
        f"{0.05 * len(effects):.0f} would. {star}{star}: still clear after Holm's correction for "
        f"all of them ({sum(holds)}). {'Not run: ' * bool(missing)}{', '.join(missing)}"
        f"{'. ' * bool(missing)}{results.config.experiment.run.steps} steps a run. "
        f"{', '.join(devices)}, torch {', '.join(sorted({s['torch'] for s in stamps}))}, commit "
        f"{', '.join(commits)}."
    )


def write_sweep(config: SweepConfig, out: Path, device: str) -> tuple[Path, str]:
    """Write results.json, tables.md and plots/ into `out`, from the runs that are finished.

    Returns:
        The JSON file, and the tables.

    Raises:
        ValueError: no setting is finished that has a baseline of the same seed.
    """
    from prereg_kernels.demo.sweep.plots import plot_sweep

    runs = finished(config, out)
    results = SweepResults(config, runs)
    if not any(not point.long_tail for point in results.settings):
        raise ValueError(f"{out}: no setting and its baseline are finished yet; expected one")
    text = markdown(results, stamps(runs))
    stored = {
        "stamp": describe_machine(torch.device(device), None),
        "config": to_dict(config),
        "runs": runs,
    }
    path = out / "results.json"
    write_whole(path, json.dumps(stored) + "\n")
    write_whole(out / "tables.md", text + "\n")
    plot_sweep(results, out / "plots")
    return path, text
