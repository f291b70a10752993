"""The paired experiment: the same model trained with and without PRe, and what that changed.

For each seed three runs see the same data from the same initial weights: the baseline; PRe; and a
control whose target comes from another scene. Each is evaluated and measured; baseline and PRe then
learn a kind of question that is new to them (the transfer test), PRe switched off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prereg_kernels._util.directories import held
from prereg_kernels._util.files import read_json, write_whole
from prereg_kernels._util.settings import check_numbers, require, require_count
from prereg_kernels._util.settings_file import from_dict, to_dict
from prereg_kernels.demo.checkpoints.checkpoint import is_checkpoint
from prereg_kernels.demo.config import RunConfig, StageConfig
from prereg_kernels.demo.data.questions import COMMON_FAMILIES, FAMILIES, check_families
from prereg_kernels.demo.data.scenes import Scenes
from prereg_kernels.demo.evaluation import evaluate
from prereg_kernels.demo.experiment.results import claim, read_result, unit_names
from prereg_kernels.demo.loop import RunResult, train
from prereg_kernels.demo.measure import measure
from prereg_kernels.demo.runs.runs import RESULT_FILE

VARIANTS = ("baseline", "pre", "other_scene")
TRANSFERS = ("lower half frozen", "everything trainable")
_NAMES = ("experiment.json", "cost.json", "summary.json", "report.html", "plots/")

Report = Callable[[str, Path, int], None]
"""Told of each phase of a unit: its name, the run's directory, its number of training steps."""


@dataclass(frozen=True)
class TransferConfig:
    """The transfer test: a question family that training never asked.

    Attributes:
        family: the new family.
        frozen_steps: of fine-tuning with the lower half frozen, which learns slowly.
        steps: of fine-tuning with everything trainable.
        lr: peak learning rate of both.
        warmup: steps up to that peak.
        questions_per_scene: in a sequence.
        evaluation_scenes: test scenes that are asked about.
    """

    family: str = "tilt"
    frozen_steps: int = 300
    steps: int = 120
    lr: float = 4e-3
    warmup: int = 10
    questions_per_scene: int = 16
    evaluation_scenes: int = 512

    def __post_init__(self) -> None:
        check_numbers(self)
        check_families({self.family: 1.0})
        for name in ("frozen_steps", "steps"):
            require(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("questions_per_scene", "evaluation_scenes"):
            require_count(name, getattr(self, name))
        require("lr", self.lr > 0, "a positive number", self.lr)
        require("warmup", self.warmup >= 0, "at least 0", self.warmup)


@dataclass(frozen=True)
class ExperimentConfig:
    """The experiment.

    Attributes:
        run: the PRe run; the other variants differ from it in PRe alone, the seeds in the seed.
        seeds: 0 to seeds - 1.
        transfer: the transfer test.
        evaluation_scenes: test scenes, a question of each family about each.
        probe_train_scenes: scenes whose objects train the probes.
        probe_test_scenes: scenes whose objects test them.
        cost_steps: training steps of baseline and PRe that are timed.
        device: that it is meant for, such as "cpu" or "cuda".
    """

    run: RunConfig = field(default_factory=RunConfig)
    seeds: int = 3
    transfer: TransferConfig = field(default_factory=TransferConfig)
    evaluation_scenes: int = 384
    probe_train_scenes: int = 256
    probe_test_scenes: int = 256
    cost_steps: int = 40
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_numbers(self)
        require_count("seeds", self.seeds, 10_000)
        for name in ("evaluation_scenes", "probe_train_scenes", "probe_test_scenes"):
            require_count(name, getattr(self, name))
        require("cost_steps", self.cost_steps >= 2, "at least 2", self.cost_steps)
        if not any(stage.pre for stage in self.run.stages):
            raise ValueError("run.stages: expected a stage with pre: true, got none")


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
        return f"seed {self.seed}, {self.variant.replace('_', ' ')}"


def units(config: ExperimentConfig) -> list[Unit]:
    """All runs; those that go through the transfer test, the longest, come first."""
    runs = [Unit(seed, variant) for seed in range(config.seeds) for variant in VARIANTS]
    return sorted(runs, key=lambda unit: unit.variant == "other_scene")


def run_config(config: ExperimentConfig, unit: Unit) -> RunConfig:
    """The unit's run."""
    run = replace(config.run, seed=unit.seed)
    if unit.variant == "baseline":
        return replace(run, stages=tuple(replace(stage, pre=False) for stage in run.stages))
    return replace(run, pre=replace(run.pre, anchor=_ANCHORS[unit.variant]))


_ANCHORS = {"pre": "pre_llm", "other_scene": "other_scene"}


def transfer_config(
    config: ExperimentConfig, seed: int, transfer: str, checkpoint: Path
) -> RunConfig:
    """The fine-tuning run on the new family, from a run's checkpoint, PRe switched off."""
    settings = config.transfer
    frozen = transfer == TRANSFERS[0]
    stage = StageConfig(
        name=f"transfer, {transfer}",
        steps=settings.frozen_steps if frozen else settings.steps,
        lr=settings.lr,
        warmup=settings.warmup,
        trainable=("llm",) if frozen else ("projector", "llm"),
        frozen_layers=config.run.pre.layer if frozen else 0,
    )
    return replace(
        config.run,
        seed=seed + 1000,  # scenes that the first training did not see
        stages=(stage,),
        families={settings.family: 1.0},
        questions_per_scene=settings.questions_per_scene,
        init_from=str(checkpoint),
        checkup_every=None,
    )


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
    result: dict[str, Any] = {"seed": unit.seed, "variant": unit.variant, **measured}
    if unit.variant != "other_scene":
        result["transfer"] = {
            name: transfer_test(config, unit.seed, name, trained, directory, report, device)
            for name in TRANSFERS
        }
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
    test = Scenes("test", run.seed, run.scenes)
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
            Scenes("train", run.seed, run.scenes),
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
        claim(out, "experiment", to_dict(config), free=("seeds",), fresh=fresh)
        yield


def _is_old_experiment(out: Path) -> bool:
    try:
        from_dict(ExperimentConfig, read_json(out / _NAMES[0]))
    except (OSError, ValueError):
        return False
    return True


def transfer_test(
    config: ExperimentConfig,
    seed: int,
    transfer: str,
    trained: RunResult,
    directory: Path,
    report: Report,
    device: str,
) -> dict[str, Any]:
    """Fine-tune a trained run on the new family, one of `TRANSFERS`; what it then answers."""
    run = transfer_config(config, seed, transfer, trained.checkpoint)
    path = directory / f"transfer-{transfer.replace(' ', '-')}"
    report(f"transfer, {transfer}", path, run.steps)
    tuned = train(run, path, cache_dir=path, progress=False, tensorboard=False, device=device)
    family = config.transfer.family
    answers = evaluate(
        tuned.model,
        tuned.packer,
        Scenes("test", seed, run.scenes),
        [family],
        n_scenes=config.transfer.evaluation_scenes,
    )
    return {
        "family": family,
        "accuracy": answers.accuracy[family],
        "majority": answers.majority[family],
        "lm_loss": answers.lm_loss,
    }
