"""The fused matmuls compile for the GPUs they are meant for, and to the instructions meant there.

Needs what `test_aot.py` needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.triton_aot.test_aot import EVERYTHING, REPOSITORY, SHARED, STACK, TRITONS, VERSIONS

TENSOR_CORES = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.mark.parametrize("target", TENSOR_CORES)
@pytest.mark.parametrize("version", VERSIONS)
def test_compiles_well(version: str, target: str) -> None:
    kernels = compile_with(version, target)
    assert {kernel["stage"] for kernel in kernels} == {
        "activate", "losses", "backward_activation", "backward_scatter",
    }  # fmt: skip
    problems = [problem for kernel in kernels for problem in problems_of(kernel, target)]
    assert not problems, "\n".join(problems)


def compile_with(version: str, target: str) -> list[dict[str, Any]]:
    """What `matmuls.py` prints, run with this Triton."""
    folder = TRITONS / version
    if not (folder / "triton").is_dir():
        pytest.skip(f"no Triton {version} in {folder}")
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton_aot.matmuls", "--target", target]
    command += ["--all"] * EVERYTHING
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def problems_of(kernel: dict[str, Any], target: str) -> list[str]:
    """What is wrong with a compiled kernel, a line each."""
    found = []
    if kernel["stack"] > STACK:
        found.append(f"{kernel['stack']} bytes of stack")
    if kernel["shared"] > SHARED[target]:
        found.append(f"{kernel['shared']} bytes of shared memory")
    if kernel["narrow_strides"]:
        found.append(f"offsets of 32 bits: {kernel['narrow_strides']}")
    if kernel["tensor_cores"] != [TENSOR_CORES[target]]:
        found.append(f"tensor cores by {kernel['tensor_cores']}")
    if not kernel["bulk_loads"]:
        found.append("operands not loaded by TMA")
    if kernel["stage"] in ("activate", "backward_activation") and not kernel["bulk_stores"]:
        found.append("results not stored by TMA")
    return [f"{kernel['case']} ({kernel['registers']} registers): {problem}" for problem in found]
