# SPDX-License-Identifier: Apache-2.0
"""A small run of every kernel, for compute-sanitizer: `make gpu-sanitize`.

Shapes with ragged edges everywhere; nothing is checked here but what the sanitizer checks.
"""

from __future__ import annotations

import torch

from prereg_kernels import fused_pre_loss
from prereg_kernels.ops import custom_ops
from prereg_kernels.ops.backends.registry import choose_backend
from prereg_kernels.ops.backends.triton.fused.matmul_config import EVERYTHING
from prereg_kernels.ops.backends.triton.fused.stages import FusedTritonBackend
from tests.gpu.support import HALVES, gpu_problem
from tests.helpers import residual_like, run, run_tap


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        problem = gpu_problem(70, (40, 72, 56), dtype=dtype)
        for options in ({}, {"recompute": True}):
            run(fused_pre_loss, problem, chunk_rows=32, backend="triton", **options)
        run_tap(problem, 0.5, residual_like(problem.hidden), backend="triton")
    custom_ops.choose_backend = lambda *_: FusedTritonBackend(EVERYTHING)
    for dtype in HALVES:
        problem = gpu_problem(70, (40, 72, 56), dtype=dtype)
        run(fused_pre_loss, problem, recompute=True)
    custom_ops.choose_backend = choose_backend
    run(fused_pre_loss, gpu_problem(70, (40,), loss="mse", normalize="layer"), backend="triton")
    torch.cuda.synchronize()
    print("sanitize_case: done")


if __name__ == "__main__":
    main()
