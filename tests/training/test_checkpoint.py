"""Checkpoints: the one before stays whole until the new one is."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from prereg_kernels.training.checkpoint import (
    CheckpointError,
    check_same_config,
    latest_checkpoint,
    restore_optimizer,
    save_checkpoint,
)


def _optimizer() -> torch.optim.AdamW:
    parameter = torch.nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.square().sum().backward()
    optimizer.step()
    return optimizer


def _save(run: Path, step: int, text: str = "weights") -> Path:
    def write(directory: Path) -> None:
        (directory / "model").write_text(text)

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
