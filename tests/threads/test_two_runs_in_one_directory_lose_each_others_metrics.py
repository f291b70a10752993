# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl has one line of the thirty steps that I saw my run do.

The same command was started twice, and each wrote into the other's directory; under torchrun each
rank did. A command holds its directory while it runs, so a second one stops with one line. The loop
is of one process and says so to torchrun.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prereg_kernels.cli.commands import main
from prereg_kernels.demo import stages
from prereg_kernels.demo.config import save_config
from prereg_kernels.demo.experiment.experiment import ExperimentConfig, open_experiment
from prereg_kernels.demo.loop import train
from prereg_kernels.demo.metrics import read_metrics
from tests.demo.tiny import tiny_run


def test_the_second_is_refused_and_the_first_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, refusals = stages._step, []

    def start_another(*args: Any) -> Any:
        monkeypatch.setattr(stages, "_step", step)
        for resume in (True, False):
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()}") as refusal:
                train(tiny_run(), tmp_path, resume, progress=False, tensorboard=False)
            refusals.append(str(refusal.value))
        return step(*args)

    monkeypatch.setattr(stages, "_step", start_another)
    train(tiny_run(), tmp_path, progress=False, tensorboard=False)
    assert len(refusals) == 2 and all("another --out" in line for line in refusals)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))


def test_two_experiments(tmp_path: Path) -> None:
    config = ExperimentConfig(run=tiny_run(), seeds=1)
    with open_experiment(config, tmp_path, False):
        (tmp_path / "seed-0").mkdir()
        for fresh in (False, True):
            with (
                pytest.raises(ValueError, match=r"in use by process .* another --out"),
                open_experiment(config, tmp_path, fresh),
            ):
                pass
        assert (tmp_path / "seed-0").exists()


@pytest.mark.parametrize("kind", ("--config", "--preset"))
def test_ranks_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    save_config(tiny_run(), tmp_path / "run.yaml")
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["prereg", "demo", kind, str(tmp_path / "run.yaml"),
                                      "--out", str(out)])  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main()
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.count("\n") == 1 and not out.exists()
    assert "WORLD_SIZE: expected one process, got 2" in errors and "PReTrainer" in errors
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        train(tiny_run(), out, progress=False, tensorboard=False)


SLEEPER = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Sleeper:
    name: str = "sleeper"
    def directory(self, out):
        return out

def run(unit, out, report, device):
    (out / "worker").write_text(str(os.getpid()))
    time.sleep(100)

if __name__ == "__main__":
    from rich.console import Console
    from prereg_kernels.demo.runs.workers import run_units
    run_units([Sleeper()], run, Path(sys.argv[1]), ["cpu"], Console())
"""


def test_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    """They would hold its runs, and write there, beside the next one's."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    command = [sys.executable, "sleeper.py", str(tmp_path)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as parent:
        while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
            assert parent.poll() is None
            time.sleep(0.1)
        worker = int((tmp_path / "worker").read_text())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    runs = _runs(worker)
    if runs:
        os.kill(worker, signal.SIGKILL)
    assert not runs


def _runs(pid: int) -> bool:
    """Whether the process is there, and not only waits to be collected."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
