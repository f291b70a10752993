# SPDX-License-Identifier: Apache-2.0
"""What a result needs to be understood later: the machine, the software, the source."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def describe_machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Names and versions; the commit as given, from PREREG_COMMIT, or from git."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu_name(),
        "driver": None,
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return facts | describe_source(commit or os.environ.get("PREREG_COMMIT"))


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_source(commit: str | None) -> dict[str, Any]:
    """The commit, and whether files differ from it; None where nobody knows."""
    if commit is not None:
        return {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}
    # an installed package may lie within somebody else's repository
    ours = _output("git", "ls-files", "--error-unmatch", "prereg_kernels/_util/machine.py")
    head = ours and _output("git", "rev-parse", "--short", "HEAD")
    if not head:
        return {"commit": "unknown", "dirty": None}
    # A study writes its results as it goes, and they compute nothing
    code = "prereg_kernels", "benchmarks", "tests", ":!benchmarks/results"
    changed = _output("git", "status", "--short", *code)
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
