# SPDX-License-Identifier: Apache-2.0
"""The command line in a process of its own or here, and an experiment small enough for it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from prereg_kernels.cli.commands import main

Command = Callable[..., "subprocess.CompletedProcess[str]"]
TINY = """
seeds: 2
run:
  model: {width: 32, tower_layers: 1, decoder_layers: 2, heads: 2, tower_mlp: 32, decoder_mlp: 32}
  pre: {layer: 1}
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


def here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, to its end; unlike `prereg_here` in a fixture of a module, too."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["prereg", *arguments])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # which it replaces
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(sys.argv, code, output.getvalue(), errors.getvalue())


def unread(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, whose reader is gone by then, as `head` may be."""
    reader, writer = os.pipe()
    os.close(reader)
    # What is printed is written at the end, as where nobody has asked Python for anything else
    buffered = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "prereg_kernels", *arguments]
    try:
        return subprocess.run(
            command, cwd=cwd, env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writer)
