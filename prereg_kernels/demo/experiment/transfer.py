# SPDX-License-Identifier: Apache-2.0
"""The transfer test: a kind of question that training never asked, learned afterwards from few
scenes, PRe switched off. What a model still holds of the image shows in how well it learns that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prereg_kernels._util.settings import check_numbers, require, require_count
from prereg_kernels.demo.config import TRAINED, RunConfig, StageConfig
from prereg_kernels.demo.data.questions import check_families
from prereg_kernels.demo.evaluation import evaluate
from prereg_kernels.demo.loop import train
from prereg_kernels.demo.runs.runs import Report

FROZEN: dict[str, tuple[str, ...]] = {"projector": ("llm",), "nothing": ("projector", "llm")}
"""What stays frozen beside the vision tower, and the parts that are trained then. A frozen tower
and projector are what LLaMA-Factory and ms-swift fine-tune with by default."""


@dataclass(frozen=True)
class TransferConfig:
    """The transfer test.

    Attributes:
        families: new question families; each is learned by itself, from the same checkpoint.
        frozen: what stays frozen meanwhile, of "projector" and "nothing"; each is tried.
        scenes: training scenes, seen over and over; None: never the same one twice.
        steps: of fine-tuning.
        lr: peak learning rate.
        warmup: steps up to that peak.
        questions_per_scene: in a sequence.
        evaluation_scenes: test scenes that are asked about.
    """

    families: tuple[str, ...] = ("tilt", "texture")
    frozen: tuple[str, ...] = tuple(FROZEN)
    scenes: int | None = 64
    steps: int = 60
    lr: float = 4e-3
    warmup: int = 10
    questions_per_scene: int = 16
    evaluation_scenes: int = 512

    def __post_init__(self) -> None:
        check_numbers(self)
        require("families", len(self.families) >= 1, "at least one family", self.families)
        check_families(dict.fromkeys(self.families, 1.0))
        known = bool(self.frozen) and set(self.frozen) <= set(FROZEN)
        require("frozen", known, f"some of {tuple(FROZEN)}", self.frozen)
        require("scenes", self.scenes is None or self.scenes >= 1, "None or >= 1", self.scenes)
        require("steps", self.steps >= 1, "at least 1", self.steps)
        for name in ("questions_per_scene", "evaluation_scenes"):
            require_count(name, getattr(self, name))
        require("lr", self.lr > 0, "a positive number", self.lr)
        require("warmup", self.warmup >= 0, "at least 0", self.warmup)


@dataclass(frozen=True)
class Lesson:
    """One fine-tuning run: what is frozen, from how many scenes, which family."""

    frozen: str
    scenes: int | None
    family: str

    @property
    def directory(self) -> str:
        """Its directory's name within its unit's."""
        return f"transfer-{self.frozen}-{self.scenes or 'new'}-{self.family}"


def lessons(
    config: TransferConfig,
    *,
    frozen: Iterable[str] | None = None,
    scenes: Sequence[int | None] | None = None,
) -> list[Lesson]:
    """All of a test's, in order; `frozen` and `scenes` stand in for the test's own."""
    return [
        Lesson(kind, count, family)
        for kind in (config.frozen if frozen is None else frozen)
        for count in ((config.scenes,) if scenes is None else scenes)
        for family in config.families
    ]


def lesson_run(run: RunConfig, config: TransferConfig, lesson: Lesson, start: Path) -> RunConfig:
    """The settings of a lesson, from the checkpoint in `start`, on scenes that were not seen."""
    stage = StageConfig(
        name=f"transfer, {lesson.frozen} frozen",
        steps=config.steps,
        lr=config.lr,
        warmup=config.warmup,
        trainable=FROZEN[lesson.frozen],
    )
    return replace(
        run,
        seed=run.seed + 1000,
        stages=(stage,),
        families={lesson.family: 1.0},
        questions_per_scene=config.questions_per_scene,
        distinct_scenes=lesson.scenes,
        init_from=str(start),
        checkup_every=None,
    )


def transfer_test(
    run: RunConfig,
    config: TransferConfig,
    todo: Sequence[Lesson],
    start: Path,
    directory: Path,
    report: Report,
    device: str,
) -> dict[str, Any]:
    """What the model in the checkpoint `start` answers after each lesson.

    Args:
        run: the run that trained it.
        directory: where each lesson's run gets a directory.

    Returns:
        {frozen: {scenes as a string: {family: {"accuracy", "majority", "lm_loss"}}}}.
    """
    found: dict[str, Any] = {}
    for lesson in todo:
        settings = lesson_run(run, config, lesson, start)
        path = directory / lesson.directory
        report(f"{lesson.family}, {TRAINED[lesson.frozen]}", path, settings.steps)
        tuned = train(
            settings, path, cache_dir=path, progress=False, tensorboard=False, device=device
        )
        answers = evaluate(
            tuned.model,
            tuned.packer,
            run.scenes.open("test", run.seed),
            [lesson.family],
            n_scenes=config.evaluation_scenes,
        )
        by_scenes = found.setdefault(lesson.frozen, {}).setdefault(str(lesson.scenes), {})
        by_scenes[lesson.family] = {
            "accuracy": answers.accuracy[lesson.family],
            "majority": answers.majority[lesson.family],
            "lm_loss": answers.lm_loss,
        }
    return found
