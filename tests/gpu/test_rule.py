# SPDX-License-Identifier: Apache-2.0
"""The rule of tests/helpers on a GPU: errors at most eager's, for every backend and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.support import DEVICE, HALVES, each_backend, each_dtype, gpu_problem, needs_gpu
from tests.helpers import check, check_tap, residual_like

pytestmark = needs_gpu


@pytest.fixture(params=("highest", "high"))
def float32_products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Without tf32 and with it; eager runs with the same setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@each_backend
@each_dtype
@pytest.mark.parametrize("tokens", (1, 127, 128, 129, 1000))
def test_rows_around_a_tile(backend: str, dtype: torch.dtype, tokens: int) -> None:
    problem = gpu_problem(tokens, dtype=dtype)
    chunk_rows = 64 if tokens in (129, 1000) else None
    check(problem, chunk_rows=chunk_rows, backend=backend)
    check_tap(problem, 0.37, residual_like(problem.hidden), chunk_rows=chunk_rows, backend=backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("widths", ((96, 160, 4096), (4096, 96), (130, 131, 129), (33, 17, 20, 9)))
def test_columns(backend: str, dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    check(gpu_problem(129, widths, dtype=dtype), factor=0.37, recompute=True, backend=backend)


@each_backend
@each_dtype
def test_no_head(backend: str, dtype: torch.dtype) -> None:
    problem = gpu_problem(257, (160,), dtype=dtype)
    # a factor as a gradient scaler's: 1/N alone would leave float16's normal numbers
    check(problem, factor=256.0, backend=backend)
    check_tap(problem, 100.0, residual_like(problem.hidden), backend=backend)


@each_backend
@pytest.mark.parametrize("activation", ("gelu_tanh", "silu", "relu"))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_activations(backend: str, activation: str, dtype: torch.dtype) -> None:
    check(gpu_problem(129, dtype=dtype, activation=activation), backend=backend)


@each_backend
@pytest.mark.parametrize("loss", ("mse", "smooth_l1"))
@pytest.mark.parametrize("normalize", ("none", "l2", "layer"))
def test_losses(backend: str, loss: str, normalize: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(gpu_problem(129, dtype=dtype, loss=loss, normalize=normalize), backend=backend)


@each_backend
def test_tf32(backend: str, float32_products: str) -> None:
    problem = gpu_problem(1000, (512, 640, 512), dtype=torch.float32)
    check(problem, backend=backend, chunk_rows=256)
    check_tap(problem, 0.37, residual_like(problem.hidden), backend=backend)


@each_backend
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_master_weights(backend: str, dtype: torch.dtype) -> None:
    problem = gpu_problem(300, dtype=dtype, weight_dtype=torch.float32)
    check(problem, backend=backend, chunk_rows=128)


@each_backend
@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_reductions(backend: str, reduction: str) -> None:
    check(gpu_problem(129, dtype=torch.bfloat16, reduction=reduction), factor=0.5, backend=backend)


@each_backend
def test_mask_and_weights(backend: str) -> None:
    mask = torch.arange(400) % 3 != 0
    weight = torch.linspace(0, 2, 400).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        problem = gpu_problem(400, indexed=False, dtype=dtype)
        problem = problem.with_options(visual_mask=mask.to(DEVICE), token_weight=weight)
        check(problem, backend=backend)


@each_backend
def test_no_visual_tokens(backend: str) -> None:
    index = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    problem = gpu_problem(7, indexed=False, dtype=torch.bfloat16).with_options(visual_index=index)
    results = check(problem, backend=backend)
    assert all(not value.any() for value in results.values())
