# SPDX-License-Identifier: Apache-2.0
"""`prereg doctor`: what this installation has, what runs here, and why the rest does not."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import product
from typing import Any

import torch

from prereg_kernels._util.machine import cpu_name
from prereg_kernels._util.supported import TESTED, bounds, is_supported
from prereg_kernels._version import __version__
from prereg_kernels.ops.activations import ACTIVATIONS
from prereg_kernels.ops.backends.cpp_libraries import describe
from prereg_kernels.ops.backends.registry import CLASSES, choose_backend, unavailable
from prereg_kernels.ops.dtypes import operand_dtype
from prereg_kernels.ops.losses import LOSSES
from prereg_kernels.ops.spec import Spec

PACKAGES = (
    "torch", "torchvision", "triton", "transformers", "accelerate", "peft", "trl", "numpy",
    "safetensors",
)  # fmt: skip
DISTRIBUTION = "prereg-kernels"
Report = dict[str, dict[str, Any]]


def examine() -> Report:
    """Facts by section: versions, cpu, gpu, backends, cpp rows. JSON-ready; nothing
    here raises."""
    return {
        "versions": {"prereg_kernels": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES}
        | {"supported": _taken(), "extras": _extras()},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "backends": _backends(),
        "cpp rows": describe(),
    }


def show(report: Report) -> str:
    """The report as text, a fact a line."""
    lines = []
    for section, facts in report.items():
        lines.append(section)
        lines += [f"  {name:<16}{_text(value)}" for name, value in facts.items()]
    return "\n".join(lines)


def doctor(as_json: bool) -> None:
    """The command: prints the report."""
    report = examine()
    print(json.dumps(report, indent=1) if as_json else show(report))


def _backends() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons follow
        auto = choose_backend("auto", device).name
    facts: dict[str, Any] = {"auto": f"{auto}, on {device}"}
    for name in CLASSES:
        where = torch.device("cpu") if name == "cpp" else device
        reason = unavailable(name, where)
        facts[name] = _coverage(name, where) if reason is None else f"does not run here: {reason}"
    return facts


def _coverage(name: str, device: torch.device) -> str:
    """That the backend runs, and what "auto" leaves to the next one."""
    backend = choose_backend(name, device)

    def is_taken(loss: str, activation: str) -> bool:
        texts = ACTIVATIONS.find(activation).text, LOSSES.find(loss).text
        return backend.refuses(Spec(*texts, "none", 1e-8, torch.float32)) is None

    taken = {x for x in product(LOSSES.names, ACTIVATIONS.names) if is_taken(*x)}
    names = (*LOSSES.names, *ACTIVATIONS.names)
    left = ", ".join(name for name in names if not any(name in pair for pair in taken))
    return f"runs; leaves {left} to the next backend" if left else "runs"


def _cpu() -> dict[str, Any]:
    emulated = [
        str(dtype).removeprefix("torch.")
        for dtype in (torch.bfloat16, torch.float16)
        if operand_dtype(dtype, torch.device("cpu")) != dtype
    ]
    return {
        "name": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "emulated": f"{', '.join(emulated)}: products run in float32" if emulated else "nothing",
        "compiler": _compiler(),
    }


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return {"found": "none" if built else "none: this torch is built for CPUs only"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "found": f"{torch.cuda.device_count()} x {properties.name}",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extras() -> dict[str, str]:
    """Of each extra of this package, whether all that it names is installed."""
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {"unknown": f"{DISTRIBUTION} runs from a folder, and is not installed"}
    named = _named(about.get_all("Requires-Dist") or [])
    facts = {}
    for extra in about.get_all("Provides-Extra") or []:
        missing = [name for name in named.get(extra, ()) if _version(name) == "not installed"]
        facts[extra] = f"lacks {', '.join(missing)}" if missing else "installed"
    return facts


def _named(requirements: Sequence[str]) -> dict[str, list[str]]:
    """{extra: the packages that it names}; an extra that names another has that one's, too."""
    named: dict[str, list[str]] = {}
    for requirement in requirements:
        what, _, condition = requirement.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", condition)
        if extra is not None:
            named.setdefault(extra[1], []).append(what.strip())
    return {extra: _packages(extra, named) for extra in named}


def _packages(extra: str, named: Mapping[str, Sequence[str]]) -> list[str]:
    packages: list[str] = []
    for what in named[extra]:
        name, inner = re.match(r"([\w.-]+)(?:\[([^\]]+)\])?", what).groups()  # type: ignore[union-attr]
        packages += _packages(inner, named) if name == DISTRIBUTION else [name]
    return packages


def _taken() -> str:
    """Which releases of transformers are, and whether the one here is one of them."""
    here = _version("transformers")
    out = "" if here == "not installed" or is_supported(here) else f"; {here} is out of bounds"
    return f"transformers {bounds()}, tested with {', '.join(TESTED)}{out}"


def _compiler() -> str:
    """The C++ compiler that a build here would use, as it names itself."""
    command = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if command is None:
        return "none found"
    try:
        run = subprocess.run(
            [*command.split(), "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command} does not run: {error}"
    return run.stdout.splitlines()[0] if run.stdout else command


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key} ({part})" for key, part in value.items()]
    if isinstance(value, list):
        value = ", ".join(value) or None
    return "none" if value is None else str(value)
