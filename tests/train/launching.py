# SPDX-License-Identifier: Apache-2.0
"""Commands that a test starts, of one process or several."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.packages.run import INSIDE, ROOT

PREREG = (sys.executable, "-m", "prereg_kernels")
RANK = "tests.train.rank"


def environment(**variables: str) -> dict[str, str]:
    """Of a process with these, too."""
    paths = [str(INSIDE), str(ROOT), variables.pop("PYTHONPATH", "")]
    scripts = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return {
        **os.environ, "PYTHONPATH": ":".join(filter(None, paths)), "OMP_NUM_THREADS": "1",
        "PATH": ":".join(scripts), **variables,
    }  # fmt: skip


def start(
    *command: str, cwd: Path, timeout: float = 200, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


def torchrun(ranks: int, *options: str, module: str = "prereg_kernels") -> tuple[str, ...]:
    """The beginning of a command that starts so many ranks."""
    return (
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", *options, "-m", module,
    )  # fmt: skip


def accelerate(config: Path, *options: str, module: str) -> tuple[str, ...]:
    """The same by accelerate, with a file of its settings."""
    return (
        sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0",
        f"--config_file={config}", *options, "-m", module,
    )  # fmt: skip


def faulty(place: Path, faults: Sequence[str]) -> dict[str, str]:
    """The variables of a start that something befalls (`tests.train.faults`)."""
    markers = place / "markers"
    markers.mkdir(parents=True, exist_ok=True)
    return {
        "FAULTS": ", ".join(faults), "MARKERS": str(markers),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
