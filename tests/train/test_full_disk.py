# SPDX-License-Identifier: Apache-2.0
"""A file system that is full at some byte of a checkpoint, or of the model at a stage's end."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import get_last_checkpoint

from prereg_kernels.train import run as run_module
from prereg_kernels.train.trainer import WRITING, RecipeTrainer, full_disk_named
from tests.train.places import make_place, metrics
from tests.train.test_run import heads, run, same, weights

PAGE = 4096
SHARES = (0.0, 0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.98)
"""Of what is to be written: how much of it finds room."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    sudo = [] if os.getuid() == 0 else ["sudo", "-n"]
    try:
        subprocess.run([*sudo, *mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a file system needs root: {error}")
    yield folder
    subprocess.run([*sudo, "umount", "-l", str(folder)], check=True)


def free(disk: Path) -> int:
    facts = os.statvfs(disk)
    return facts.f_bavail * facts.f_frsize


def contents(folder: Path) -> dict[str, str]:
    """{name: its hash} of all files below."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def fails_at(disk: Path, stage: Path, share: float, size: int, write: Callable[[], Any]) -> None:
    """Where so many of the bytes are free, it fails, and says why."""
    shutil.rmtree(stage / WRITING, ignore_errors=True)  # as the next attempt does
    room = int(share * size) // PAGE * PAGE
    filler = disk / "filler"
    filler.write_bytes(b"x" * (free(disk) - room))
    assert free(disk) == room
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device"):
        write()
    filler.unlink()


def test_another_error_of_writing_stays(tmp_path: Path) -> None:
    """Torch's own, on a disk that has room."""
    error = RuntimeError("[enforce fail at inline_container.cc:858] . unexpected pos 64 vs 0")
    with pytest.raises(RuntimeError, match="unexpected pos"), full_disk_named(tmp_path / "new"):
        raise error


def test_at_any_byte(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays as it was, and the run goes on as if nothing had been."""
    place = make_place(tmp_path / "place")
    short = {"stages__0__max_steps": 1, "stages__1__max_steps": 5}
    whole = run(place, tmp_path / "whole", **short)
    out, tried = disk / "out", list[str]()
    write_checkpoint, save = RecipeTrainer._write_checkpoint, run_module._save

    def writing(trainer: Any, *args: Any) -> None:
        stage = Path(trainer.args.output_dir)
        if stage.name == "tune" and trainer.state.global_step == 4:
            before = contents(stage / "checkpoint-2")
            size = sum(path.stat().st_size for path in (stage / "checkpoint-2").rglob("*.*"))
            for share in SHARES:
                fails_at(disk, stage, share, size, lambda: write_checkpoint(trainer, *args))
                assert get_last_checkpoint(str(stage)) == str(stage / "checkpoint-2")
                assert contents(stage / "checkpoint-2") == before
                tried.append("checkpoint")
        write_checkpoint(trainer, *args)

    def saving(trainer: Any, folder: Path, result: Path, load: Any) -> Any:
        if result == out:
            before = contents(out)
            size = (folder / "checkpoint-5/model.safetensors").stat().st_size
            for share in SHARES:
                fails_at(disk, folder, share, size, lambda: save(trainer, folder, result, load))
                left = contents(out)
                assert {name: left[name] for name in before} == before
                assert not any("/" not in name for name in left.keys() - before.keys())
                tried.append("model")
        return save(trainer, folder, result, load)

    with monkeypatch.context() as patch:
        patch.setattr(RecipeTrainer, "_write_checkpoint", writing)
        patch.setattr(run_module, "_save", saving)
        run(place, out, **short)
    assert tried == ["checkpoint"] * len(SHARES) + ["model"] * len(SHARES)
    assert same(weights(out), weights(whole)) and same(heads(out), heads(whole))
    assert [x["lm_loss"] for x in metrics(out, "tune")] == [
        x["lm_loss"] for x in metrics(whole, "tune")
    ]
