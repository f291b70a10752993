# SPDX-License-Identifier: Apache-2.0
"""Directories that commands write into: whose they are, and one command at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prereg_kernels._util.directories import held
from prereg_kernels.demo.checkpoints.checkpoint import is_checkpoint
from prereg_kernels.demo.runs.processes import check_one_process

NAMES = ("settings.yaml", "log/")


@contextmanager
def run_in(directory: Path, kind: str = "run", *, ours: bool = False) -> Iterator[None]:
    with held(directory, kind, NAMES, lambda _: ours, is_checkpoint):
        yield


def refuse(message: str, directory: Path, kind: str = "run", *, ours: bool = False) -> None:
    with pytest.raises((ValueError, OSError), match=message), run_in(directory, kind, ours=ours):
        pass


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("name", ("settings.yaml", "log/"))
def test_what_is_somebody_elses_is_refused_and_left(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name
    theirs.mkdir() if name.endswith("/") else theirs.write_text("mine")
    before = tree(tmp_path)
    refuse(rf"{name.rstrip('/')} there was not written by this com", tmp_path)
    assert tree(tmp_path) == before
    with run_in(tmp_path, ours=True):  # known by what it holds
        pass
    with run_in(tmp_path):  # and from then on by its mark
        pass


def test_other_names_are_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with run_in(tmp_path / "deep" / "below"), run_in(tmp_path):
        (tmp_path / "settings.yaml").write_text("ours")
    with run_in(tmp_path):
        pass
    refuse("holds a run; expected another --out", tmp_path, "sweep")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        run_in(tmp_path),
        pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*another --out"),
        run_in(tmp_path),
    ):
        pass
    with run_in(tmp_path):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from prereg_kernels._util.directories import held
with held(Path(sys.argv[1]), "run", (), lambda _: False, lambda _: False):
    print("held", flush=True)
    time.sleep(100)
"""


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        refuse(f"in use by process {holder.pid} on ", tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with run_in(tmp_path):
        assert json.loads((tmp_path / ".prereg").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("there", "message"),
    (
        ("settings.yaml/x", r"settings\.yaml: expected a file, got a directory"),
        ("log", "log: expected a directory, got a file"),
        (".prereg", r"\.prereg: not valid JSON"),
    ),
)
def test_files_in_place_of_directories_and_the_reverse(
    tmp_path: Path, there: str, message: str
) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("x")
    refuse(message, tmp_path, ours=True)


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refuse("file: expected a directory, got a file", tmp_path / "file")
    refuse(r"--out: expected a name in UTF-8, got .*\\udcff", tmp_path / os.fsdecode(b"\xff"))
    (tmp_path / "loop").symlink_to("loop")
    refuse("loop", tmp_path / "loop")
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "training_state.json").write_text("{}")
    (tmp_path / "link").symlink_to(checkpoint)
    for inside in (checkpoint, checkpoint / "a" / "b", tmp_path / "link" / "c"):
        with (
            pytest.raises(
                ValueError, match=r"inside of the checkpoint .*step-00000004, which goes"
            ),
            run_in(inside),
        ):
            pass
    assert [path.name for path in checkpoint.iterdir()] == ["training_state.json"]


@pytest.mark.parametrize(("ranks", "refused"), ((None, False), ("1", False), ("2", True)))
def test_ranks(monkeypatch: pytest.MonkeyPatch, ranks: str | None, refused: bool) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    if not refused:
        check_one_process()
        return
    with pytest.raises(ValueError, match=r"WORLD_SIZE: expected one process, got 2: .*PReTrainer"):
        check_one_process()
