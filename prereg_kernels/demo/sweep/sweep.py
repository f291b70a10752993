# SPDX-License-Identifier: Apache-2.0
"""A paired sweep over PRe's settings, one at a time, about those of an experiment.

For each seed there is one baseline, which all settings share: same data, same initial weights. The
runs differ from the experiment's in PRe alone; but for the long-tailed mix of questions, whose runs
have a baseline of their own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prereg_kernels._util.directories import held
from prereg_kernels._util.files import read_json, write_whole
from prereg_kernels._util.machine import describe_machine
from prereg_kernels._util.settings import check_numbers, require
from prereg_kernels._util.settings_file import from_dict, to_dict
from prereg_kernels.demo.checkpoints.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    clear_checkpoints,
    is_checkpoint,
)
from prereg_kernels.demo.config import CONTROLS, PReSettings, RunConfig
from prereg_kernels.demo.data.questions import check_families
from prereg_kernels.demo.experiment.experiment import (
    ExperimentConfig,
    train_and_measure,
    unit_steps_left,
)
from prereg_kernels.demo.experiment.results import check_settings, claim, read_result, unit_names
from prereg_kernels.demo.experiment.transfer import Lesson, lessons, transfer_test
from prereg_kernels.demo.runs.runs import RESULT_FILE, Report, remove_if_empty

_NAMES = ("sweep.json", "results.json", "tables.md", "plots/")
AXES = {
    "weights": "weight",
    "layers": "layer",
    "anchors": "anchor",
    "token_fractions": "token_fraction",
}
"""The sweep's lists, and the settings of PRe whose values they hold."""
_SEEDS = ("seeds", "first_seed")
_FREE = (*_SEEDS, *AXES, "curve_scenes", "curve_settings")  # they say what else is run


@dataclass(frozen=True)
class SweepConfig:
    """The sweep.

    Attributes:
        experiment: its run with PRe is the centre, from which each setting differs in one thing;
            its seeds, evaluation, probes and device are the sweep's.
        weights: values to try; the centre's is always there, as for the next three.
        layers: values to try.
        anchors: values to try.
        token_fractions: values to try.
        long_tail: {question family: weight} of a second mix, on which a baseline and the centre are
            trained too; None: no such runs.
        transfer: each setting also goes through the experiment's transfer test.
        curve_scenes: numbers of scenes for a learning curve: the transfer test from so many, with
            the first of its `frozen`.
        curve_settings: names of the settings that have a curve beside the baseline, such as
            "weight 5", where they are in the sweep.
    """

    experiment: ExperimentConfig
    weights: tuple[float, ...] = ()
    layers: tuple[int, ...] = ()
    anchors: tuple[str, ...] = ()
    token_fractions: tuple[float, ...] = ()
    long_tail: Mapping[str, float] | None = None
    transfer: bool = False
    curve_scenes: tuple[int, ...] = ()
    curve_settings: tuple[str, ...] = ("centre",)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.long_tail is not None:
            check_families(self.long_tail)
        depth = self.experiment.run.model.decoder_layers
        for axis, field in AXES.items():
            for value in getattr(self, axis):
                try:
                    replace(self.experiment.run.pre, **{field: value})
                except ValueError as error:
                    raise ValueError(f"{axis}: {error}") from None
        for layer in self.layers:
            if layer > depth:
                raise ValueError(f"layers: expected at most {depth}, the depth, got {layer}")
        controls = set(self.anchors).intersection(CONTROLS.values())
        if controls and self.experiment.run.micro_batch < 2:
            raise ValueError(
                f"anchors: {sorted(controls)[0]} needs micro_batch >= 2; expected {tuple(CONTROLS)}"
            )
        for count in self.curve_scenes:
            require("curve_scenes", count >= 1, "at least 1", count)
        kinds = [CENTRE, *(_short(field) for field in AXES.values())]
        for name in self.curve_settings:
            known = name.partition(" ")[0] in kinds
            require("curve_settings", known, f"one of {kinds}, and a value", name)


@dataclass(frozen=True)
class Point:
    """A setting: PRe's, None for a baseline, and whether its questions are the long-tailed mix's.

    Its name says in what it differs from the centre.
    """

    name: str
    pre: PReSettings | None
    long_tail: bool = False

    @property
    def baseline(self) -> str:
        """The name of the point that it is compared with."""
        return LONG_TAIL_BASELINE if self.long_tail else BASELINE


BASELINE, CENTRE = "baseline", "centre"
LONG_TAIL_BASELINE, LONG_TAIL = "long tail, baseline", "long tail, centre"


@dataclass(frozen=True)
class SweepUnit:
    """One run with all that is measured on it."""

    point: Point
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"seed {self.seed}, {self.point.name}"

    def directory(self, out: Path) -> Path:
        """Where its files are."""
        return out / f"seed-{self.seed}" / self.point.name.replace(", ", "-").replace(" ", "-")


def axis_points(config: SweepConfig, axis: str) -> dict[Any, Point]:
    """{value: point} along one of `AXES`, the centre among them, ascending but for the anchors."""
    centre, field = config.experiment.run.pre, AXES[axis]
    own = getattr(centre, field)
    values = dict.fromkeys((own, *getattr(config, axis)))
    ordered = list(values) if axis == "anchors" else sorted(values)
    settings = {}
    for value in ordered:
        text = f"{value:g}" if isinstance(value, float) else str(value)
        name = CENTRE if value == own else f"{_short(field)} {text}"
        settings[value] = Point(name, replace(centre, **{field: value}))
    return settings


def _short(field: str) -> str:
    """What a setting of PRe is called in names."""
    return field.removeprefix("token_")


def points(config: SweepConfig) -> list[Point]:
    """All settings, baseline and centre first, each once."""
    by_name = {BASELINE: Point(BASELINE, None), CENTRE: Point(CENTRE, config.experiment.run.pre)}
    for axis in AXES:
        by_name |= {point.name: point for point in axis_points(config, axis).values()}
    tail = []
    if config.long_tail is not None:
        tail = [Point(LONG_TAIL_BASELINE, None, True), Point(LONG_TAIL, by_name[CENTRE].pre, True)]
    return [*by_name.values(), *tail]


def units(config: SweepConfig) -> list[SweepUnit]:
    """All runs: setting by setting, so that what a stopped sweep has is whole settings."""
    seeds = config.experiment.all_seeds
    return [SweepUnit(point, seed) for point in points(config) for seed in seeds]


def lessons_of(config: SweepConfig, point: Point) -> list[Lesson]:
    """What a setting's models learn afterwards; nothing on the long-tailed mix, which asks some of
    it in training."""
    if point.long_tail:
        return []
    test = config.experiment.transfer
    wanted = lessons(test) if config.transfer else []
    if point.name == BASELINE or point.name in config.curve_settings:
        wanted += lessons(test, frozen=test.frozen[:1], scenes=config.curve_scenes)
    return list(dict.fromkeys(wanted))


def steps_left(config: SweepConfig, out: Path) -> int:
    """Training steps that are not done yet, those of the lessons among them."""
    left = 0
    for unit in units(config):
        wanted, directory = lessons_of(config, unit.point), unit.directory(out)
        done = read_result(directory)
        todo = wanted if done is None else _missing(wanted, done)
        if done is None or todo:
            left += unit_steps_left(config.experiment, directory, todo)
    return left


def _missing(wanted: list[Lesson], result: dict[str, Any]) -> list[Lesson]:
    found = result.get("transfer", {})
    return [
        lesson
        for lesson in wanted
        if lesson.family not in found.get(lesson.frozen, {}).get(str(lesson.scenes), {})
    ]


def run_config(config: SweepConfig, unit: SweepUnit) -> RunConfig:
    """The unit's run."""
    run, pre = config.experiment.run, unit.point.pre
    families = config.long_tail if unit.point.long_tail else run.families
    assert families is not None
    stages = run.stages
    if pre is None:
        stages = tuple(replace(stage, pre=False) for stage in stages)
    return replace(
        run,
        seed=unit.seed,
        pre=pre or run.pre,
        stages=stages,
        families=families,
        checkup_every=None,
    )


def run_unit(
    config: SweepConfig, unit: SweepUnit, out: Path, report: Report, device: str
) -> dict[str, Any]:
    """Train, evaluate and measure a unit; what `result.json` already has is not done again.

    The checkpoint goes once the result is there: a sweep has many runs. Where only lessons of the
    transfer test are missing, the model is trained anew for them, which has a stamp of its own.
    """
    directory = unit.directory(out)
    wanted = lessons_of(config, unit.point)
    done = read_result(directory)
    todo = wanted if done is None else _missing(wanted, done)
    if done is not None and not todo:
        return done
    experiment = config.experiment
    run = run_config(config, unit)
    trained, measured = train_and_measure(experiment, run, directory, out / "cache", report, device)
    stamp = describe_machine(torch.device(device), None)
    result = done or {"point": unit.point.name, "seed": unit.seed, **measured, "stamp": stamp}
    if done is not None:
        result.setdefault("later_stamps", []).append(stamp)
    test, start = experiment.transfer, trained.checkpoint
    for frozen, by_scenes in transfer_test(
        run, test, todo, start, directory, report, device
    ).items():
        for scenes, answers in by_scenes.items():
            kind = result.setdefault("transfer", {}).setdefault(frozen, {})
            kind.setdefault(scenes, {}).update(answers)
    write_whole(directory / RESULT_FILE, json.dumps(result, indent=1))
    for run_dir in (directory, *directory.glob("transfer-*/")):
        with contextlib.suppress(CheckpointError):  # somebody's files are in one: it stays
            clear_checkpoints(run_dir)
        remove_if_empty(run_dir / CHECKPOINTS)
    return result


@contextmanager
def open_sweep(config: SweepConfig, out: Path, fresh: bool) -> Iterator[None]:
    """Begin or resume a sweep in `out`, and hold it meanwhile. More seeds and more values can be
    added to what is there.

    Args:
        fresh: remove what is there (the trained towers stay).

    Raises:
        ValueError: what is there was made with other settings, or is somebody else's, or in use.
    """
    with held(out, "sweep", (*_NAMES, *unit_names(out)), _is_old_sweep, is_checkpoint):
        claim(out, "sweep", _settings(config), free=_FREE, fresh=fresh)
        yield


def check_sweep(config: SweepConfig, out: Path) -> None:
    """Raise ValueError if what is in `out` was made with other settings; it may be in use."""
    check_settings(out, "sweep", _settings(config), free=_FREE)


def _settings(config: SweepConfig) -> dict[str, Any]:
    settings = to_dict(config)
    for name in _SEEDS:
        settings[name] = settings["experiment"].pop(name)
    return settings


def _is_old_sweep(out: Path) -> bool:
    try:
        values = read_json(out / _NAMES[0])
        values["experiment"].pop("transfer", None)  # of another kind in version 0.1.0
        for name in _SEEDS:
            values["experiment"][name] = values.pop(name, 0)  # it had no first_seed either
        from_dict(SweepConfig, values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def stamps(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machines and commits that made these results."""
    return [stamp for run in runs for stamp in (run["stamp"], *run.get("later_stamps", ()))]


def finished(config: SweepConfig, out: Path) -> list[dict[str, Any]]:
    """The results that are there, in the order of `units`."""
    results = (read_result(unit.directory(out)) for unit in units(config))
    return [result for result in results if result is not None]
