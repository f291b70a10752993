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
ROOT = Path(__file__).parents[2]


def run() -> dict[str, str]:
    environment = os.environ | PORTABLE | {"PORTABLE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.ops.bitwise"]
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    return json.loads(output.stdout)


def test_fixed_calls_return_the_recorded_bits() -> None:
    """Recorded for one release of torch; of another, two processes have to agree.

    After a change that means to move numbers: PORTABLE=1 and the variables of `PORTABLE`, then
    `python -m tests.ops.bitwise`.
    """
    record = json.loads(RECORD.read_text())
    ours = run()
    assert len(ours) == len(record["digests"]) > 300
    here = {"torch": torch.__version__.partition("+")[0], "machine": platform.machine()}
    expected = record["digests"] if here == record["made with"] else run()
    differ = [name for name, digest in ours.items() if digest != expected[name]]
    assert not differ
