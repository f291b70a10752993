# SPDX-License-Identifier: Apache-2.0
"""The paired experiment: the same model trained with and without PRe, and what that changed.

For each seed three runs see the same data from the same initial weights: the baseline; PRe; and a
control whose target comes from another scene. Each is evaluated and measured, and then learns kinds
of question that are new to it from few scenes (the transfer test), PRe switched off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prereg_kernels._util.directories import held
from prereg_kernels._util.files import read_json, write_whole
from prereg_kernels._util.settings import check_numbers, require, require_count
from prereg_kernels._util.settings_file import from_dict, to_dict
from prereg_kernels.demo.checkpoints.checkpoint import is_checkpoint, steps_saved
from prereg_kernels.demo.config import CONTROLS, RunConfig
from prereg_kernels.demo.data.questions import COMMON_FAMILIES, FAMILIES
from prereg_kernels.demo.evaluation import evaluate
from prereg_kernels.demo.experiment.results import claim, read_result, unit_names
from prereg_kernels.demo.experiment.transfer import (
    Lesson,
    TransferConfig,
    lessons,
    transfer_test,
)
from prereg_kernels.demo.loop import RunResult, train
from prereg_kernels.demo.measure import measure
from prereg_kernels.demo.runs.runs import RESULT_FILE, Report

VARIANTS = {"baseline": "baseline", "pre": "PRe", "other_scene": "control"}
"""{variant: what tables call it}"""
_NAMES = ("experiment.json", "cost.json", "summary.json", "report.html", "plots/")


@dataclass(frozen=True)
class ExperimentConfig:
    """The experiment.

    Attributes:
        run: the PRe run; the other variants differ from it in PRe alone, the seeds in the seed.
        seeds: how many.
        first_seed: the first of them.
        transfer: the transfer test.
        evaluation_scenes: test scenes, a question of each family about each.
        probe_train_scenes: scenes whose objects train the probes.
        probe_test_scenes: scenes whose objects test them.
        cost_steps: training steps of baseline and PRe that are timed.
        device: that it is meant for, such as "cpu" or "cuda".
    """

    run: RunConfig = field(default_factory=RunConfig)
    seeds: int = 3
    first_seed: int = 0
    transfer: TransferConfig = field(default_factory=TransferConfig)
    evaluation_scenes: int = 384
    probe_train_scenes: int = 256
    probe_test_scenes: int = 256
    cost_steps: int = 40
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_numbers(self)
        require_count("seeds", self.seeds, 10_000)
        require("first_seed", self.first_seed >= 0, "at least 0", self.first_seed)
        anchor = self.run.pre.anchor
        require("run.pre.anchor", anchor in CONTROLS, f"one of {tuple(CONTROLS)}", anchor)
        for name in ("evaluation_scenes", "probe_train_scenes", "probe_test_scenes"):
            require_count(name, getattr(self, name))
        require("cost_steps", self.cost_steps >= 2, "at least 2", self.cost_steps)
        if not any(stage.pre for stage in self.run.stages):
            raise ValueError("run.stages: expected a stage with pre: true, got none")

    @property
    def all_seeds(self) -> range:
        """The seeds of the paired runs."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclass(frozen=True)
class Unit:
    """One run with all that is measured on it."""

    seed: int
    variant: str

    def directory(self, out: Path) -> Path:
        """Where its files are."""
        return out / f"seed-{self.seed}" / self.variant

    @property
    def name(self) -> str:
        """For people."""
        return f"seed {self.seed}, {VARIANTS[self.variant]}"


def units(config: ExperimentConfig) -> list[Unit]:
    """All runs."""
    return [Unit(seed, variant) for seed in config.all_seeds for variant in VARIANTS]


def steps_left(config: ExperimentConfig, out: Path) -> int:
    """Training steps that are not done yet, those of the lessons among them."""
    directories = [unit.directory(out) for unit in units(config)]
    todo = lessons(config.transfer)
    return sum(unit_steps_left(config, x, todo) for x in directories if read_result(x) is None)


def unit_steps_left(config: ExperimentConfig, directory: Path, todo: Sequence[Lesson]) -> int:
    """Those of a unit that has these lessons to do: what its checkpoints hold is done."""
    runs = {directory: config.run.steps}
    runs |= {directory / lesson.directory: config.transfer.steps for lesson in todo}
    return sum(steps - min(steps_saved(path), steps) for path, steps in runs.items())


def run_config(config: ExperimentConfig, unit: Unit) -> RunConfig:
    """The unit's run."""
    run = replace(config.run, seed=unit.seed)
    if unit.variant == "baseline":
        return replace(run, stages=tuple(replace(stage, pre=False) for stage in run.stages))
    if unit.variant == "other_scene":
        return replace(run, pre=replace(run.pre, anchor=CONTROLS[run.pre.anchor]))
    return run


def run_unit(
    config: ExperimentConfig, unit: Unit, out: Path, report: Report, device: str
) -> dict[str, Any]:
    """Train, evaluate and measure a unit; what `result.json` already has is not done again."""
    directory = unit.directory(out)
    done = read_result(directory)
    if done is not None:
        return done
    run = run_config(config, unit)
    trained, measured = train_and_measure(config, run, directory, out / "cache", report, device)
    test = config.transfer
    learned = transfer_test(run, test, lessons(test), trained.checkpoint, directory, report, device)
    result = {"seed": unit.seed, "variant": unit.variant, **measured, "transfer": learned}
    write_whole(directory / RESULT_FILE, json.dumps(result, indent=1))
    return result


def train_and_measure(
    config: ExperimentConfig,
    run: RunConfig,
    directory: Path,
    cache: Path,
    report: Report,
    device: str,
) -> tuple[RunResult, dict[str, Any]]:
    """Train a run, ask it the common questions and those of its own mix, and measure its layers.

    Returns:
        The trained run, and what a result holds of it.
    """
    report("training", directory, run.steps)
    trained = train(run, directory, cache_dir=cache, progress=False, device=device)
    report("measuring", directory, 0)
    test = run.scenes.open("test", run.seed)
    names = [name for name in FAMILIES if name in COMMON_FAMILIES or run.families.get(name, 0) > 0]
    answers = evaluate(
        trained.model, trained.packer, test, names, n_scenes=config.evaluation_scenes
    )
    return trained, {
        "accuracy": answers.accuracy,
        "majority": answers.majority,
        "mean_accuracy": answers.mean_accuracy,
        "lm_loss": answers.lm_loss,
        "train_step_seconds": trained.step_seconds,
        **measure(
            trained.model,
            run.scenes.open("train", run.seed),
            test,
            train_scenes=config.probe_train_scenes,
            test_scenes=config.probe_test_scenes,
        ),
    }


@contextmanager
def open_experiment(config: ExperimentConfig, out: Path, fresh: bool) -> Iterator[None]:
    """Begin or resume an experiment in `out`, and hold it meanwhile: results of other settings are
    never mixed in.

    Args:
        fresh: remove what is there (the trained towers stay).

    Raises:
        ValueError: what is there was made with other settings, or is somebody else's, or in use.
    """
    names = (*_NAMES, *unit_names(out))
    with held(out, "experiment", names, _is_old_experiment, is_checkpoint):
        claim(out, "experiment", to_dict(config), free=("seeds", "first_seed"), fresh=fresh)
        yield


def _is_old_experiment(out: Path) -> bool:
    try:
        values = read_json(out / _NAMES[0])
        values.pop("transfer", None)  # of another kind in version 0.1.0
        from_dict(ExperimentConfig, values)
    except (OSError, ValueError, AttributeError):
        return False
    return True
