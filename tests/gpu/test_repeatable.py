# SPDX-License-Identifier: Apache-2.0
"""The same bits on every run, whatever was in the memory before."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from prereg_kernels import fused_pre_loss
from tests.gpu.support import assert_same, each_backend, each_dtype, gpu_problem, needs_gpu
from tests.helpers import residual_like, run, run_tap

pytestmark = needs_gpu
RUNS = 100


@each_backend
@each_dtype
def test_bitwise(backend: str, dtype: torch.dtype) -> None:
    problem = gpu_problem(2000, (256, 256, 256), dtype=dtype)
    first = run(fused_pre_loss, problem, chunk_rows=512, backend=backend)
    for _ in range(RUNS - 1):
        assert_same(first, run(fused_pre_loss, problem, chunk_rows=512, backend=backend))


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, or of the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        # of what is not deterministic elsewhere, such as cuBLAS without its setting
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@each_backend
@each_dtype
@pytest.mark.parametrize("recompute", (False, True))
def test_writes_what_it_reads(backend: str, dtype: torch.dtype, recompute: bool) -> None:
    problem = gpu_problem(300, (96, 160, 128), dtype=dtype)
    options = {"chunk_rows": 128, "recompute": recompute, "backend": backend}
    clean = run(fused_pre_loss, problem, **options)
    with poisoned():
        assert torch.empty(3, device=problem.hidden.device).isnan().all()
        assert_same(clean, run(fused_pre_loss, problem, **options))


@each_backend
def test_tap_writes_what_it_reads(backend: str) -> None:
    problem = gpu_problem(300, (96, 160, 128), dtype=torch.bfloat16)
    residual = residual_like(problem.hidden)
    clean = run_tap(problem, 0.5, residual, chunk_rows=128, backend=backend)
    with poisoned():
        assert_same(clean, run_tap(problem, 0.5, residual, chunk_rows=128, backend=backend))
