# SPDX-License-Identifier: Apache-2.0
"""Checkups during training: they change nothing, and say what a checkup afterwards says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file

from prereg_kernels.checkup.images.processing import process
from prereg_kernels.checkup.loading import load
from prereg_kernels.checkup.report.style import THEMES
from prereg_kernels.demo.data.packing import pixel_values
from prereg_kernels.demo.data.scenes import Scenes
from prereg_kernels.demo.experiment.plots import progress
from prereg_kernels.demo.experiment.summary import Results
from prereg_kernels.demo.loop import train
from prereg_kernels.demo.training_checkup import (
    CHECKUPS_FILE,
    CheckupLog,
    read_checkups,
    training_checkup,
)
from tests.demo.tiny import tiny_run

STEPS = 8


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkups after steps 3, 6 and none at the end, and one without."""
    out = tmp_path_factory.mktemp("runs")
    for name, every in (("with", 3), ("without", None)):
        run = tiny_run(checkup_every=every, checkup_scenes=24)
        train(run, out / name, cache_dir=out, progress=False, tensorboard=False)
    return out


def test_they_change_no_weight(out: Path) -> None:
    one, other = (
        load_file(out / name / "checkpoints" / "step-00000008" / "model.safetensors")
        for name in ("with", "without")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert read_checkups(out / "without") == []


def test_a_checkpoint_sees_image_files_as_training_sees_scenes(out: Path) -> None:
    loaded = load(out / "with" / "checkpoints" / "step-00000008")
    [note] = loaded.notes  # of a model that was trained without one
    assert note.startswith("There is no chat template")
    scene = Scenes("test").scene(0)
    grey = np.round(255 * scene.image).astype(np.uint8)
    found = process(loaded.processor, np.repeat(grey[:, :, None], 3, axis=2))["pixel_values"]
    # a grey of 1/255 is 1/64 in the model's units
    torch.testing.assert_close(found, pixel_values(scene.image[None]), rtol=0, atol=0.5 / 63.75)


def test_they_say_what_is_measured_afterwards(out: Path, tmp_path: Path) -> None:
    rows = read_checkups(out / "with")
    assert [row["step"] for row in rows] == [3, 6]
    run = tiny_run(checkup_every=STEPS, checkup_scenes=24)
    result = train(run, tmp_path, cache_dir=out, progress=False, tensorboard=False)
    [last] = read_checkups(tmp_path)
    found = training_checkup(result.model, result.packer, run)  # PRe is off, in eval mode
    assert last == json.loads(json.dumps({"step": STEPS, **found}))
    assert not result.model.training
    assert len(found["probe"]["tilt"]) == 3


def test_a_resumed_run_repeats_none_and_misses_none(tmp_path: Path) -> None:
    log = CheckupLog(tmp_path, 0)
    assert not (tmp_path / CHECKUPS_FILE).exists()
    for step in (2, 4, 6):
        log.write(step, {"mean_accuracy": step / 10})
    log.close()
    with (tmp_path / CHECKUPS_FILE).open("a") as file:
        file.write('{"step": 8, "mean_acc')  # killed while it wrote
    log = CheckupLog(tmp_path, 4)
    log.write(6, {"mean_accuracy": 0.9})
    log.close()
    assert read_checkups(tmp_path) == [
        {"step": 2, "mean_accuracy": 0.2},
        {"step": 4, "mean_accuracy": 0.4},
        {"step": 6, "mean_accuracy": 0.9},
    ]


def test_the_figure_over_training(tmp_path: Path) -> None:
    variants = ("baseline", "pre", "other_scene")
    results = Results([{"seed": seed, "variant": v} for seed in (0, 1) for v in variants])
    assert progress(results, tmp_path, 1, THEMES["light"]) is None
    names = ("digit", "polarity", "tilt", "texture", "thickness")
    for seed in (0, 1):
        directory = tmp_path / f"seed-{seed}" / "pre"
        directory.mkdir(parents=True)
        log = CheckupLog(directory, 0)
        for step in (10, 20):
            probe = {name: [1.0, 0.3 * (name != "digit") + 0.1 * seed] for name in names}
            log.write(step, {"mean_accuracy": step / 100 + 0.1 * seed, "probe": probe})
        log.close()
    drawing = progress(results, tmp_path, 1, THEMES["light"])
    assert drawing is not None
    answers, unasked, asked = (axis.lines[0] for axis in drawing.figure.axes)
    assert answers.get_xdata().tolist() == [10, 20]
    assert answers.get_ydata().tolist() == pytest.approx([15, 25])
    assert unasked.get_ydata().tolist() == pytest.approx([35, 35])
    assert asked.get_ydata().tolist() == pytest.approx([5, 5])
    plt.close(drawing.figure)
