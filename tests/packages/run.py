# SPDX-License-Identifier: Apache-2.0
"""A trainer started by its own command, and what its steps were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside"
QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a training run left.

    Attributes:
        recorded: the recorder's folder.
        output: the trainer's output directory.
        text: what it printed.
    """

    recorded: Path
    output: Path
    text: str

    def step(self, number: int, rank: int = 0) -> dict[str, Any]:
        """Of a step that ended with this `global_step`'s optimizer step, 0 the first."""
        name = f"{rank}.{number}.pt" if rank else f"{number}.pt"
        return torch.load(self.recorded / name, weights_only=False)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The parameters at the end."""
        return torch.load(self.recorded / "end.pt")["weights"]

    def logs(self, checkpoint: str) -> list[dict[str, float]]:
        """The entries of the regular logs."""
        state = json.loads((self.output / checkpoint / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "learning_rate" in entry]


def folder_of(package: str) -> Path:
    """Where make puts a package and what it pins.

    Raises:
        RuntimeError: it is not there.
    """
    folder = ROOT / ".packages" / package
    if not (folder / ".ready").exists():
        raise RuntimeError(f"expected {package} in {folder}; make .packages/{package}/.ready")
    return folder


def run(
    package: str,
    command: Sequence[str],
    place: Path,
    output: Path,
    *,
    environment: Mapping[str, str] = {},
    is_expected_to_fail: bool = False,
    timeout: float = 900,
) -> Run:
    """Start a command of the package's own: its console script's name, and its arguments.

    Args:
        place: a folder of this run's own, where it runs, and where its steps are recorded.
        output: the output directory that the command names.
    """
    folder, recorded = folder_of(package), place / "recorded"
    place.mkdir(parents=True, exist_ok=True)
    name, *arguments = command
    program = folder / "bin" / name
    start = [str(program)] if program.exists() else ["-m", name]
    paths = [str(folder), str(INSIDE), str(ROOT)]
    scripts = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = {
        **os.environ, **QUIET, "PYTHONPATH": ":".join(paths), "PATH": ":".join(scripts),
        "RECORDED": str(recorded), **environment,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *start, *arguments], cwd=place, env=variables, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert (done.returncode != 0) == is_expected_to_fail, done.stdout[-6000:]
    return Run(recorded, output, done.stdout)
