# SPDX-License-Identifier: Apache-2.0
"""The whole of `make gpu-first` on a CPU, at sizes of no importance: `make test-gpu-first`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[3]
BUDGET = 480.0  # of which a quiet machine takes an eighth
pytestmark = pytest.mark.dry


@pytest.mark.parametrize("name", ("first", "second"))
def test_dry_run(name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    options = ["--out", str(tmp_path), "--size", "tiny", "--seconds", str(BUDGET)]
    more = ["--what", "qwen"] if name == "second" else []  # compilers take their time on a CPU
    command = [sys.executable, "-m", "benchmarks.first", name, *options, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - began < BUDGET
    files = {path.name: path for path in tmp_path.iterdir()}
    run = json.loads(files[f"{name}.json"].read_text())
    assert run["complete"] is True
    assert {part["status"] for part in run["parts"]} == {"ok"}
    if name == "second":
        assert files.keys() == {"second.json", "second.log", "gpu_step_qwen.json"}
        return
    assert files.keys() == {
        "first.json", "first.log", "first_tests.xml", "first_trace.json.gz", "gpu.json",
        "gpu_accuracy.json", "gpu_step_llava.json", "first_more_tests.xml",
    }  # fmt: skip
    assert set(run["results"]) == {"ceilings", "profile", "forms", "chunks"}
    for name in ("gpu.json", "gpu_accuracy.json", "gpu_step_llava.json"):
        stored = json.loads(files[name].read_text())
        assert stored["complete"] is True and stored["problems"] == [], name
    tests = ElementTree.parse(files["first_tests.xml"]).findall(".//testcase")
    assert 35 <= len(tests) <= 45
