"""The scripts in examples/ run, and L_PRe falls."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"sft_trainer": ("trl", "datasets")}


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in EXAMPLES.glob("*.py") if not path.stem.startswith("tiny"))
)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in NEEDS.get(name, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    check_fall(lines)
    if name == "pre_trainer":
        assert "resumed, the same: True" in lines


def test_accelerate_loop_on_two_ranks(tmp_path: Path) -> None:
    """It trains, and ends: the process group's threads must not outlive what they need."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(EXAMPLES / "accelerate_loop.py")],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_fall(done.stdout.splitlines())


def check_fall(lines: list[str]) -> None:
    """The last line has L_PRe at the first and at the last step."""
    found = re.fullmatch(r"pre_loss (-?\d\.\d{3}) -> (-?\d\.\d{3})", lines[-1])
    assert found, lines[-1]
    first, last = map(float, found.groups())
    assert last < first - 0.3
