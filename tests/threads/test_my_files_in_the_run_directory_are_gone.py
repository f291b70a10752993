# SPDX-License-Identifier: Apache-2.0
"""I trained into a directory where I had files of my own, and they are gone.

`--fresh` deleted `checkpoints` whoever had made it, the next checkpoint deleted copies such as
`step-00000003-keep`, and `config.yaml` and `metrics.jsonl` of another program were overwritten. A
command deletes and overwrites what bears its own mark; where it would have to touch more, it stops
with one line and has touched nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from prereg_kernels.cli.commands import main
from prereg_kernels.demo.config import save_config
from prereg_kernels.demo.loop import TrainingInterrupted, train
from tests.cli.run import TINY
from tests.demo.tiny import as_version_0_1_0, signal_in_step, tiny_run


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line with which the command stops."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["prereg", *arguments])
        main()
    errors = capsys.readouterr().err
    assert (stop.value.code, errors.count("\n")) == (2, 1), errors
    return errors


MINE = {
    "checkpoints/best/model.pt": "weights",
    "checkpoints/step-00000003/model.pt": "weights",
    "config.yaml": "learning_rate: 3\n",
    "metrics.jsonl": '{"step": 1, "loss": 2.0}\n',
    "checkups.jsonl": "{}\n",
    "tensorboard/events.out.tfevents.1": "events",
}


@pytest.mark.parametrize("fresh", ([], ["--fresh"]))
@pytest.mark.parametrize("name", MINE)
def test_of_another_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, fresh: list[str]
) -> None:
    save_config(tiny_run(), tmp_path / "run.yaml")
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text(MINE[name])
    before = tree(out)
    line = refused(capsys, "demo", "--config", f"{tmp_path}/run.yaml", "--out", str(out), *fresh)
    assert f"{out}: {name.split('/')[0]} there was not written by this command" in line
    assert tree(out) == before


def test_settings_that_somebody_commented_stay(tmp_path: Path) -> None:
    """They may lie where the run goes, where they are its own."""
    save_config(tiny_run(), tmp_path / "config.yaml")
    text = "# what I want\n" + (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        signal_in_step(patch, 1)
        train(tiny_run(), tmp_path, progress=False, tensorboard=False)
    with pytest.raises(ValueError, match=r"config\.yaml there was not written by this command"):
        as_version_0_1_0(tmp_path)
        train(tiny_run(), tmp_path, progress=False, tensorboard=False)
    assert (tmp_path / "config.yaml").read_text() == text


def test_copies_of_checkpoints_stay(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        signal_in_step(patch, 3)
        train(tiny_run(), tmp_path, progress=False, tensorboard=False)
    saved = tmp_path / "checkpoints" / "step-00000003"
    copies = [saved.with_name(f"step-00000003{end}") for end in ("-keep", ".bak")]
    for copy in copies:
        shutil.copytree(saved, copy)
    (tmp_path / "metrics.tmp").write_text("mine")
    before = [tree(copy) for copy in copies]
    for fresh in (False, True):
        train(tiny_run(), tmp_path, not fresh, progress=False, tensorboard=False)
        names = {path.name for path in saved.parent.iterdir()}
        assert names == {"step-00000008", *(copy.name for copy in copies)}
        assert [tree(copy) for copy in copies] == before
    assert (tmp_path / "metrics.tmp").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "name"),
    (("demo", "experiment.json"), ("demo", "report.html"), ("sweep", "results.json"),
     ("sweep", "tables.md"), ("demo", "seed-0/images/1.png")),
)  # fmt: skip
@pytest.mark.parametrize("fresh", ([], ["--fresh"]))
def test_of_another_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, fresh: list[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "sweep.yaml").write_text(f"preset: {tmp_path}/tiny.yaml\nweights: [1]\n")
    preset = tmp_path / ("tiny.yaml" if command == "demo" else "sweep.yaml")
    out = tmp_path / "out"
    for there in (name, "seed-data/1.png"):
        (out / there).parent.mkdir(parents=True, exist_ok=True)
        (out / there).write_text('{"mine": 1}')
    before = tree(out)
    line = refused(
        capsys, command, "--preset", str(preset), "--out", str(out), "--workers", "1", *fresh
    )
    assert f"{name.split('/')[0]} there was not written by this command" in line
    assert tree(out) == before


def test_a_fresh_experiment_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    from prereg_kernels.demo.experiment.experiment import ExperimentConfig, Unit, open_experiment

    config = ExperimentConfig(run=tiny_run(), seeds=1)
    with open_experiment(config, tmp_path, False):
        directory = Unit(0, "pre").directory(tmp_path)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
            signal_in_step(patch, 1)
            train(tiny_run(), directory, progress=False, tensorboard=True)
        (directory / "result.json").write_text("{}")
        settings = directory / "config.yaml"
        settings.write_text("# what I found\n" + settings.read_text())
    mine = ("seed-0/pre/notes.txt", "seed-0/pictures/1.png", "seed-data/1.png", "seed-1/1.png")
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with open_experiment(config, tmp_path, True):
        files = {name for name, content in tree(tmp_path).items() if content is not None}
    towers = {name for name in files if "/tower-" in name}
    left = {*mine, str(settings.relative_to(tmp_path))}
    assert files - towers == {*left, "experiment.json", ".prereg", ".prereg.lock"}
    (tmp_path / "seed-1" / "pre").mkdir()
    (tmp_path / "seed-1" / "pre" / "result.json").write_text(json.dumps({"accuracy": 1}))
    with (
        pytest.raises(ValueError, match="seed-1/pre: its result is not of a run here"),
        open_experiment(config, tmp_path, True),
    ):
        pass
