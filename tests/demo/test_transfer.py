# SPDX-License-Identifier: Apache-2.0
"""The transfer test: what is frozen, from which scenes, what is asked; and that it is PRe's run."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prereg_kernels.cli.demo import load_preset, load_sweep
from prereg_kernels.demo.checkpoints.checkpoint import checkpoint_path
from prereg_kernels.demo.config import CONTROLS, PReSettings
from prereg_kernels.demo.data.scenes import Scenes
from prereg_kernels.demo.evaluation import evaluate
from prereg_kernels.demo.experiment.experiment import (
    ExperimentConfig,
    Unit,
    run_config,
    steps_left,
    units,
)
from prereg_kernels.demo.experiment.transfer import (
    Lesson,
    TransferConfig,
    lesson_run,
    lessons,
    transfer_test,
)
from prereg_kernels.demo.loop import RunResult, train
from prereg_kernels.demo.model.saved import load_model
from prereg_kernels.demo.sweep import sweep as sweeps
from tests.demo.tiny import tiny_run

TEST = TransferConfig(
    families=("tilt", "polarity"), scenes=3, steps=2, warmup=1, questions_per_scene=4,
    evaluation_scenes=9,
)  # fmt: skip
OTHER: dict[str, Any] = {"weight": 0.3, "layer": 2, "anchor": "pre_projector"}
OTHER["token_fraction"] = 0.25


@pytest.mark.parametrize("preset", ["scenes", "scenes-gpu", "scenes-gpu-text"])
@pytest.mark.parametrize("name", [field.name for field in fields(PReSettings)])
def test_what_is_asked_for_is_trained(preset: str, name: str) -> None:
    experiment = load_preset(preset)
    for anchor in CONTROLS:
        pre = replace(experiment.run.pre, anchor=anchor)
        pre = replace(pre, **{name: OTHER[name]})
        asked = replace(experiment, run=replace(experiment.run, pre=pre))
        run = run_config(asked, Unit(4, "pre"))
        assert run == replace(asked.run, seed=4)
        control = run_config(asked, Unit(4, "other_scene"))
        assert control == replace(run, pre=replace(pre, anchor=CONTROLS[pre.anchor]))
        baseline = run_config(asked, Unit(4, "baseline"))
        assert not any(stage.pre for stage in baseline.stages)


def test_a_control_is_no_experiment() -> None:
    run = tiny_run(pre=PReSettings(layer=1, anchor="other_scene"))
    message = r"^run.pre.anchor: expected one of \('pre_llm', 'pre_projector'\), got 'other_scene'"
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(run=run)


def test_seeds_begin_where_they_are_told() -> None:
    config = ExperimentConfig(run=tiny_run(), seeds=2, first_seed=70)
    assert sorted({unit.seed for unit in units(config)}) == [70, 71]
    assert steps_left(config, Path("nowhere")) == 6 * (tiny_run().steps + 4 * 60)
    sweep = sweeps.SweepConfig(config)
    assert [unit.name for unit in sweeps.units(sweep)[:2]] == [
        "seed 70, baseline", "seed 71, baseline",
    ]  # fmt: skip


def test_what_checkpoints_hold_is_not_left(tmp_path: Path) -> None:
    """Of a unit's own run, and of each of its lessons."""
    config = ExperimentConfig(run=tiny_run(), seeds=1, transfer=TEST)
    everything, own, lesson = steps_left(config, tmp_path), tiny_run().steps, TEST.steps
    pre = Unit(0, "pre").directory(tmp_path)
    for steps in (1, own):
        checkpoint_path(pre, steps).mkdir(parents=True)
        assert steps_left(config, tmp_path) == everything - steps
    checkpoint_path(pre / lessons(TEST)[0].directory, lesson).mkdir(parents=True)
    assert steps_left(config, tmp_path) == everything - own - lesson


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("trained")
    return train(tiny_run(), out, progress=False, tensorboard=False)


@pytest.fixture(scope="module")
def taught(
    trained: RunResult, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("taught")
    found = transfer_test(
        tiny_run(), TEST, lessons(TEST), trained.checkpoint, out, lambda *phase: None, "cpu"
    )
    return out, found


def test_each_lesson_has_its_answers(trained: RunResult, taught: tuple[Path, Any]) -> None:
    out, found = taught
    assert [lesson.directory for lesson in lessons(TEST)] == [
        "transfer-projector-3-tilt", "transfer-projector-3-polarity",
        "transfer-nothing-3-tilt", "transfer-nothing-3-polarity",
    ]  # fmt: skip
    for lesson in lessons(TEST):
        [checkpoint] = (out / lesson.directory / "checkpoints").iterdir()
        assert not (checkpoint / "pre").exists()  # PRe is off
        answers = evaluate(
            load_model(checkpoint), trained.packer, Scenes("test", 0), [lesson.family], n_scenes=9
        )
        assert found[lesson.frozen]["3"][lesson.family] == {
            "accuracy": answers.accuracy[lesson.family],
            "majority": answers.majority[lesson.family],
            "lm_loss": pytest.approx(answers.lm_loss),
        }


@pytest.mark.parametrize("frozen", ["projector", "nothing"])
def test_what_is_frozen_stays(trained: RunResult, taught: tuple[Path, Any], frozen: str) -> None:
    before = load_file(trained.checkpoint / "model.safetensors")
    [checkpoint] = (taught[0] / f"transfer-{frozen}-3-tilt" / "checkpoints").iterdir()
    after = load_file(checkpoint / "model.safetensors")
    moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
    parts = {"projector": "projector", "tower": "vision_tower", "llm": "language_model"}
    for part, path in parts.items():
        inside = {name for name in before if path in name}
        assert inside, part
        if part == "llm":
            assert moved >= {name for name in inside if "proj" in name}
        else:
            assert bool(moved & inside) == (part == "projector" and frozen == "nothing"), part


def test_a_lesson_is_about_few_scenes_that_training_did_not_see(
    trained: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    batch = Scenes.batch

    def watched(self: Scenes, indices: Any) -> Any:
        indices = list(indices)
        seen.extend((self.split, self.seed, i) for i in indices)
        return batch(self, indices)

    monkeypatch.setattr(Scenes, "batch", watched)
    lesson = Lesson("projector", 3, "tilt")
    run = lesson_run(tiny_run(), replace(TEST, steps=5), lesson, trained.checkpoint)
    assert dict(run.families) == {"tilt": 1.0}
    train(run, tmp_path, progress=False, tensorboard=False)
    assert {scene for scene in seen if scene[0] == "train"} == {
        ("train", 1000, i) for i in range(3)
    }


def test_lessons_that_are_missing_are_made_up_for(tmp_path: Path) -> None:
    experiment = ExperimentConfig(
        run=tiny_run(), seeds=1, transfer=replace(TEST, families=("tilt",), frozen=("projector",)),
        evaluation_scenes=8, probe_train_scenes=24, probe_test_scenes=24,
    )  # fmt: skip
    config = sweeps.SweepConfig(experiment, weights=(0.5,), transfer=True)
    more = replace(config, curve_scenes=(2, 3), curve_settings=("centre",))
    by_name = {unit.point.name: unit for unit in sweeps.units(config)}
    report = lambda *phase: None  # noqa: E731

    def run(config: sweeps.SweepConfig, name: str) -> dict[str, Any]:
        return sweeps.run_unit(config, by_name[name], tmp_path, report, "cpu")

    steps, lesson = tiny_run().steps, TEST.steps
    assert sweeps.steps_left(config, tmp_path) == 3 * (steps + lesson)
    first = run(config, "centre")
    assert sweeps.steps_left(config, tmp_path) == 2 * (steps + lesson)
    assert first["transfer"].keys() == {"projector"}
    assert first["transfer"]["projector"].keys() == {"3"}
    assert not list(tmp_path.glob("seed-*/**/checkpoints"))
    assert sweeps.steps_left(more, tmp_path) == 3 * steps + (2 + 1 + 1) * lesson
    again = run(more, "centre")
    assert again["stamp"] == first["stamp"] and len(again["later_stamps"]) == 1
    assert len(sweeps.stamps([again])) == 2
    assert again["transfer"]["projector"].keys() == {"2", "3"}
    assert again["transfer"]["projector"]["3"] == first["transfer"]["projector"]["3"]
    unchanged = ("accuracy", "probe", "lm_loss", "seed", "point")
    assert [again[name] for name in unchanged] == [first[name] for name in unchanged]
    other = run(more, "weight 0.5")
    assert other["transfer"]["projector"].keys() == {"3"}  # no curve was asked for
    assert run(more, "centre") == again  # nothing was done


def test_the_sweep_has_settings_of_its_own() -> None:
    sweep, preset = load_sweep("scenes"), load_preset("scenes")
    families = ("polarity", "tilt", "texture", "thickness")
    assert sweep.experiment == replace(
        preset, seeds=5, first_seed=200, transfer=replace(preset.transfer, families=families)
    )
    names = {point.name for point in sweeps.points(sweep)}
    assert sweep.curve_scenes and set(sweep.curve_settings) <= names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ()}, r"^families: expected at least one family, got \(\)"),
        ({"families": ("weather",)}, r"^families: unknown \['weather'\]"),
        ({"frozen": ("tower",)}, r"^frozen: expected some of \('projector', 'nothing'\), got"),
        ({"scenes": 0}, r"^scenes: expected None or >= 1, got 0"),
        ({"steps": 0}, r"^steps: expected at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TEST, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curve_scenes": (0,)}, r"^curve_scenes: expected at least 1, got 0"),
        (
            {"curve_settings": ("wieght 9",)},
            r"^curve_settings: expected one of \['centre', 'weight', .*\], and a value, got 'wi",
        ),
    ],
)
def test_bad_curves_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweeps.SweepConfig(ExperimentConfig(run=tiny_run()), **changes)
