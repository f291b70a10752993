# SPDX-License-Identifier: Apache-2.0
"""A fixture of a module is set up once, however many workers there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURE = """
import os
import pathlib
import pytest

@pytest.fixture(scope="module")
def big():
    (pathlib.Path(__file__).parent / f"big-{os.getpid()}").touch()

@pytest.mark.parametrize("i", range(8))
def test_with_it(big, i):
    pass
"""
NONE = """
import os
import pathlib
import time
import pytest

@pytest.mark.parametrize("i", range(8))
def test_without(i):
    time.sleep(0.05)
    (pathlib.Path(__file__).parent / f"small-{os.getpid()}").touch()
"""


def test_a_module_s_fixture_is_set_up_in_one_worker(tmp_path: Path) -> None:
    (tmp_path / "test_fixture.py").write_text(FIXTURE)
    (tmp_path / "test_none.py").write_text(NONE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "tests.workers"]
    command += ["-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "16 passed" in run.stdout, run.stdout + run.stderr
    assert len(list(tmp_path.glob("big-*"))) == 1
    assert len(list(tmp_path.glob("small-*"))) == 2, "the other tests are shared out"
