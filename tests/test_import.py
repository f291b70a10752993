# SPDX-License-Identifier: Apache-2.0
"""What `import prereg_kernels` loads."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def imported() -> set[str]:
    command = [sys.executable, "-X", "importtime", "-c", "import prereg_kernels"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if "|" in line}


def test_the_package_itself_is_seen(imported: set[str]) -> None:
    assert {"torch", "prereg_kernels", "prereg_kernels.ops.loss"} <= imported


@pytest.mark.parametrize(
    "heavy", ("transformers", "triton", "matplotlib", "sklearn", "accelerate", "safetensors")
)
def test_heavy_packages_are_not_loaded(imported: set[str], heavy: str) -> None:
    assert not {name for name in imported if name.split(".")[0] == heavy}
