# SPDX-License-Identifier: Apache-2.0
"""The command line in a process of its own, and an experiment small enough for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., "subprocess.CompletedProcess[str]"]
TINY = """
seeds: 2
run:
  tower: {steps: 3, batch: 4}
  stages:
    - {name: projector, steps: 1, trainable: [projector]}
    - {name: projector and llm, steps: 3, warmup: 1, pre: true}
  micro_batch: 4
  questions_per_scene: 4
transfer: {families: [tilt], scenes: 3, steps: 2, warmup: 1, evaluation_scenes: 8}
evaluation_scenes: 8
probe_train_scenes: 24
probe_test_scenes: 24
cost_steps: 2
"""


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Begin `prereg` with these arguments."""
    command = [
        sys.executable,
        "-m",
        "prereg_kernels",
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def prereg(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same to its end."""
    process = start(*arguments, cwd=cwd)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
