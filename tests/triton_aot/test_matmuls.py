# SPDX-License-Identifier: Apache-2.0
"""The fused matmuls compile for the GPUs they are meant for, and to the instructions meant there.

Needs what `test_aot.py` needs. As no plan has them yet, the newest Triton does, but for a complete
run.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.triton_aot.test_aot import AOT, VERSIONS, compile_with, problems_of_any

TENSOR_CORES = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.mark.parametrize("target", TENSOR_CORES)
@pytest.mark.parametrize("version", VERSIONS if AOT else VERSIONS[-1:])
def test_compiles_well(version: str, target: str) -> None:
    kernels = compile_with(version, "matmuls", target)
    assert {kernel["stage"] for kernel in kernels} == {
        "activate", "losses", "backward_activation", "backward_scatter",
    }  # fmt: skip
    problems = [problem for kernel in kernels for problem in problems_of(kernel, target)]
    assert not problems, "\n".join(problems)


def problems_of(kernel: dict[str, Any], target: str) -> list[str]:
    """What is wrong with a compiled matmul, a line each."""
    found = problems_of_any(kernel, target)
    if kernel["tensor_cores"] != [TENSOR_CORES[target]]:
        found.append(f"tensor cores by {kernel['tensor_cores']}")
    if not kernel["bulk_loads"]:
        found.append("operands not loaded by TMA")
    if kernel["stage"] in ("activate", "backward_activation") and not kernel["bulk_stores"]:
        found.append("results not stored by TMA")
    return [f"{kernel['case']} ({kernel['registers']} registers): {problem}" for problem in found]
