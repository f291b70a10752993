# SPDX-License-Identifier: Apache-2.0
"""Results are bitwise what they were: a change of the code's shape may not change a number."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from tests.ops.bitwise import PORTABLE

RECORD = Path(__file__).with_name("bitwise.json")
HERE = {"torch": torch.__version__.partition("+")[0], "machine": platform.machine()}
ROOT = Path(__file__).parents[2]


def run() -> dict[str, str]:
    environment = os.environ | PORTABLE | {"PORTABLE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.ops.bitwise"]
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    return json.loads(output.stdout)


def test_fixed_calls_return_the_recorded_bits() -> None:
    """Recorded for one release of torch; of another, two processes have to agree.

    After a change that means to move numbers, `python -m tests.ops.test_bitwise` records them anew.
    """
    record = json.loads(RECORD.read_text())
    ours = run()
    assert len(ours) == len(record["digests"]) > 300
    expected = record["digests"] if record["made with"] == HERE else run()
    differ = [name for name, digest in ours.items() if digest != expected[name]]
    assert not differ
    assert record["made with"] != HERE or RECORD.read_text() == text_of(HERE, ours)


def text_of(made_with: dict[str, str], digests: dict[str, str]) -> str:
    return json.dumps({"made with": made_with, "digests": digests}, indent=1) + "\n"


if __name__ == "__main__":
    RECORD.write_text(text_of(HERE, run()))
