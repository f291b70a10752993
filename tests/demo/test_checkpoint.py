# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the one before stays whole until the new one is."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prereg_kernels.demo.checkpoints.checkpoint import (
    CheckpointError,
    check_same_config,
    clear_checkpoints,
    latest_checkpoint,
    restore_optimizer,
    save_checkpoint,
    set_damaged_aside,
)


def _optimizer() -> torch.optim.AdamW:
    parameter = torch.nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.square().sum().backward()
    optimizer.step()
    return optimizer


def _write(directory: Path) -> None:
    (directory / "model").write_text("weights")


def _save(run: Path, step: int, write: Callable[[Path], None] = _write) -> Path:
    return save_checkpoint(
        run, step=step, stage=1, config={"a": {"b": 1}}, optimizer=_optimizer(), write_model=write
    )


def test_the_newest_replaces_the_one_before(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (3, 12):
        path = _save(tmp_path, step)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.stage, found.config) == (path, 12, 1, {"a": {"b": 1}})
    assert [item.name for item in path.parent.iterdir()] == ["step-00000012"]


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _save(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("torch.save", "os.fsync", "pathlib.Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(CheckpointError, match=r"step-00000002.*No space left") as caught:
                _save(tmp_path, 2)
        assert "\n" not in str(caught.value)
        assert [item.name for item in before.parent.iterdir()] == [before.name], name
        found = latest_checkpoint(tmp_path)
        assert found is not None and found.step == 1
        restore_optimizer(found, _optimizer())


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a directory should be")
    with pytest.raises(CheckpointError, match="could not write checkpoint") as caught:
        _save(tmp_path, 1)
    assert "\n" not in str(caught.value)


def test_half_written_directories_are_not_found(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    half = tmp_path / "checkpoints" / "step-00000005.writing"
    half.mkdir()
    (half / "model").write_text("half")
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    _save(tmp_path, 2)
    assert not half.exists()


def test_only_what_a_run_wrote_is_deleted(tmp_path: Path) -> None:
    first = _save(tmp_path, 3)
    copies = {}
    for name in ("step-00000003-keep", "step-00000003.bak", "mine", "step-3"):
        shutil.copytree(first, first.with_name(name))
        copies[name] = sorted(path.name for path in first.iterdir())
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(first, elsewhere)
    first.with_name("step-00000001").symlink_to(elsewhere)
    noted = _save(tmp_path, 4)
    (noted / "notes.txt").write_text("the good one")
    last = _save(tmp_path, 5)
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.path == last
    expected = {*copies, "step-00000001", noted.name, last.name}
    assert {path.name for path in last.parent.iterdir()} == expected
    for name, files in copies.items():
        assert sorted(path.name for path in first.with_name(name).iterdir()) == files
    with pytest.raises(CheckpointError, match=r"step-00000004: notes\.txt in it is not the run's"):
        clear_checkpoints(tmp_path)  # nothing is deleted, the last one neither
    (noted / "notes.txt").unlink()
    with pytest.raises(CheckpointError, match="step-00000001: it is not a directory of this run"):
        clear_checkpoints(tmp_path)
    first.with_name("step-00000001").unlink()
    assert latest_checkpoint(tmp_path) is not None
    clear_checkpoints(tmp_path)
    assert {path.name for path in last.parent.iterdir()} == set(copies) and elsewhere.exists()


def test_somebody_elses_directory_of_that_name(tmp_path: Path) -> None:
    theirs = tmp_path / "checkpoints" / "step-00000007"
    theirs.mkdir(parents=True)
    (theirs / "weights.bin").write_text("theirs")
    with pytest.raises(CheckpointError, match="step-00000007: it has a checkpoint's name, but is"):
        clear_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"could not read checkpoint .*step-00000007"):
        latest_checkpoint(tmp_path)
    _save(tmp_path, 5)
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 5
    with pytest.raises(CheckpointError, match="step-00000007 has a checkpoint's name, but is none"):
        set_damaged_aside(found)
    with pytest.raises(CheckpointError, match=r"could not write checkpoint .*step-00000007"):
        _save(tmp_path, 7)
    assert (theirs / "weights.bin").read_text() == "theirs"


def test_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1)
    shutil.copytree(saved, tmp_path / "kept")
    for count in range(2):
        newest = _save(tmp_path, 2)
        if not saved.exists():
            shutil.copytree(tmp_path / "kept", saved)
        (newest / "model").write_text("Weights")  # as long as before
        found = latest_checkpoint(tmp_path)
        assert found is not None and found.path == saved
        [line] = set_damaged_aside(found)
        assert f"{newest} is damaged: model holds other bytes than were written" in line
        assert "going on from step-00000001" in line
        aside = newest.with_name("step-00000002.damaged" + "-2" * count)
        assert not newest.exists() and (aside / "model").read_text() == "Weights"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    (
        ("model", None, "model is missing"),
        ("model", "weight", "model has 6 bytes, expected 7"),
        ("training_state.pt", "weight", "training_state.pt has 6 bytes, expected"),
        ("training_state.json", '{"step": 1}', "training_state.json has 11 bytes"),
        ("prereg_manifest.json", "{}", "prereg_manifest.json: expected a list of files"),
        ("prereg_manifest.json", '{"files": {}}', "does not list .'training_state.json', 'train"),
        ("prereg_manifest.json", "", "prereg_manifest.json: not valid JSON"),
        ("training_state.json", "[" * 100_000, "training_state.json: not valid JSON"),
    ),
)
def test_what_is_wrong_is_said(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = _save(tmp_path, 1)
    (path / name).unlink() if content is None else (path / name).write_text(content)
    expected = f"could not read checkpoint .*step-00000001: .*{message}.*--fresh"
    with pytest.raises(CheckpointError, match=expected):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"step": 2}, "training_state.json is of step 2, expected that of the directory's name"),
        ({"step": True}, "of step True"),
        ({"stage": -1}, "expected a stage and settings, got -1"),
        ({"config": []}, r"expected a stage and settings, got 1, \[\]"),
    ),
)
def test_a_state_without_a_manifest_is_checked(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """As version 0.1.0 wrote it."""
    path = _save(tmp_path, 1)
    (path / "prereg_manifest.json").unlink()
    assert latest_checkpoint(tmp_path) is not None
    state = json.loads((path / "training_state.json").read_text())
    (path / "training_state.json").write_text(json.dumps(state | change))
    with pytest.raises(CheckpointError, match=message):
        latest_checkpoint(tmp_path)


def test_permissions(tmp_path: Path) -> None:
    """New files have those that the umask leaves, later ones those of the checkpoint before."""

    def modes(path: Path) -> tuple[int, ...]:
        return tuple(item.stat().st_mode & 0o777 for item in (path, path / "model"))

    def closed(directory: Path) -> None:  # as safetensors writes
        (directory / "model").touch(0o600)

    before = os.umask(0o027)
    try:
        path = _save(tmp_path, 1, write=closed)
        assert modes(path) == (0o750, 0o640)
        path.chmod(0o755)
        (path / "model").chmod(0o644)
        assert modes(_save(tmp_path, 2, write=closed)) == (0o755, 0o644)
    finally:
        os.umask(before)


def test_broken_state_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / "training_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"could not read checkpoint .*step-00000001"):
        latest_checkpoint(tmp_path)


def test_everything_random_and_the_optimizer_come_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    _save(tmp_path, 1)

    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    expected = draw()
    draw()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))], lr=0.5)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    restore_optimizer(found, other)
    assert draw() == expected
    mine, theirs = (item.state_dict() for item in (_optimizer(), other))
    assert mine["param_groups"] == theirs["param_groups"]
    assert torch.equal(mine["state"][0]["exp_avg"], theirs["state"][0]["exp_avg"])


def test_only_tensors_and_plain_values_are_unpickled(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    torch.save({"optimizer": random.Random(0), "rng": {}}, path / "training_state.pt")
    (path / "prereg_manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"could not read .*training_state.pt cannot be read"):
        latest_checkpoint(tmp_path)


def test_a_different_config_is_named(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    check_same_config(found, {"a": {"b": 1}})
    for other, message in (
        ({"a": {"b": 2}}, r"a\.b: cannot resume .* trained with 1, this run asks for 2"),
        ({"a": {"b": 1, "c": 0}}, r"a\.c: .*'no such setting', this run asks for 0"),
        ({"a": {}}, r"a\.b: .* asks for 'no such setting'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_config(found, other)
