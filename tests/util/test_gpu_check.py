# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` finds NVIDIA's GPUs and AMD's. The commands that ask are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("make", "sh", "env", "mkdir", "timeout", "test")


def check(folder: Path, commands: dict[str, str]) -> str:
    """What `make gpu-check` says, where these commands are there, and say what they say."""
    for name in TOOLS:
        (folder / name).symlink_to(str(shutil.which(name)))
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": str(folder), "OUT": str(folder / "out"), "HOME": os.environ["HOME"]}
    run = subprocess.run(
        ["make", "gpu-check", "PYTHON=python"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip().splitlines()[-1]


RAN = "gpu-check: tests passed, benchmark passed"
NONE = "gpu-check: no GPU on this machine, nothing was run"
# What torch says, where it is asked for ROCm and a GPU
ROCM = 'case "$2" in *torch.version.hip*) exit {};; esac'.format


@pytest.mark.parametrize(
    ("commands", "expected"),
    (
        ({"nvidia-smi": "exit 0", "python": "exit 0"}, RAN),
        ({"nvidia-smi": "exit 9", "python": "exit 0"}, NONE),
        ({"rocm-smi": "exit 0", "python": ROCM(0)}, RAN),
        ({"rocm-smi": "exit 0", "python": ROCM(1)}, NONE),
        ({"nvidia-smi": "exit 9", "rocm-smi": "exit 0", "python": ROCM(0)}, RAN),
        ({"python": ROCM(0)}, NONE),
    ),
)
def test_gpu_check(tmp_path: Path, commands: dict[str, str], expected: str) -> None:
    assert check(tmp_path, commands) == expected
