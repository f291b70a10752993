# SPDX-License-Identifier: Apache-2.0
"""What is held between forward and backward, and allocators of another kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from prereg_kernels import fused_pre_loss, pre_tap
from tests.gpu.support import each_backend, gpu_problem, needs_gpu
from tests.helpers import run

pytestmark = needs_gpu
ROOT = Path(__file__).parents[2]
NOTHING = 64 * 1024  # bytes: scalars and autograd's bookkeeping


@each_backend
def test_tap_holds_nothing(backend: str) -> None:
    problem = gpu_problem(8192, (512, 512, 512), dtype=torch.bfloat16)
    run(fused_pre_loss, problem, backend=backend)  # workspaces
    arguments = problem.arguments(problem.leaves())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    tapped, value = pre_tap(*arguments, **problem.options, backend=backend)
    assert torch.cuda.memory_allocated() - before < NOTHING
    value.backward()
    del tapped


@each_backend
def test_recompute_holds_nothing(backend: str) -> None:
    problem = gpu_problem(8192, (512, 512, 512), dtype=torch.bfloat16)
    run(fused_pre_loss, problem, recompute=True, backend=backend)
    arguments = problem.arguments(problem.leaves())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = fused_pre_loss(*arguments, **problem.options, recompute=True, backend=backend)
    # reduction="none" inside: a float32 a token
    assert torch.cuda.memory_allocated() - before < NOTHING + 4 * 8192
    loss.backward()


@each_backend
def test_scratch_does_not_grow_with_the_tokens(backend: str) -> None:
    def scratch(tokens: int) -> int:
        problem = gpu_problem(tokens, (256, 256, 256), dtype=torch.bfloat16)
        run(fused_pre_loss, problem, chunk_rows=2048, backend=backend)
        arguments = problem.arguments(problem.leaves())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = fused_pre_loss(*arguments, **problem.options, chunk_rows=2048, backend=backend)
        outputs = torch.cuda.memory_allocated() - before
        del loss
        return torch.cuda.max_memory_allocated() - before - outputs

    assert scratch(32_768) <= 1.1 * scratch(8192) + NOTHING


def test_expandable_segments() -> None:
    setting = "expandable_segments:True"
    script = (
        "import torch; from tests.gpu.support import gpu_problem; from tests.helpers import check\n"
        "check(gpu_problem(300, dtype=torch.bfloat16), chunk_rows=128)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTORCH_CUDA_ALLOC_CONF": setting,
        "PYTORCH_ALLOC_CONF": setting,  # its name from torch 2.9 on
    }
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
