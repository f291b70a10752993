# SPDX-License-Identifier: Apache-2.0
"""The whole loss on Triton's row kernels, by the rule for its numbers.

TRITON_INTERPRET=1 python -m pytest tests/ops/backends/test_triton_pipeline.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prereg_kernels import fused_pre_loss
from prereg_kernels.ops.backends.triton import backend as triton_backend
from prereg_kernels.ops.backends.triton.backend import interpreting, unavailable
from tests.helpers import check, check_tap, make_problem, residual_like, run, run_tap

if not interpreting():
    pytest.skip("tests/gpu does this on GPUs", allow_module_level=True)

from tests.ops.backends.interpreter import repair

assert unavailable("cpu") is None, unavailable("cpu")
repair()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS: tuple[dict[str, Any], ...] = (
    {"loss": "mse", "normalize": "layer", "activation": "silu"},
    {"loss": "smooth_l1", "normalize": "l2", "activation": "gelu_tanh"},
    {"loss": "smooth_l1", "activation": "relu"},
)
INDEX = torch.tensor([0, 5, 13, 9])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_eager(dtype: torch.dtype) -> None:
    check(make_problem(dtype=dtype, visual_index=INDEX), chunk_rows=3, backend="triton")


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_options(options: dict[str, Any]) -> None:
    problem = make_problem(dtype=torch.bfloat16, visual_index=INDEX, **options)
    check(problem, chunk_rows=3, backend="triton")


@pytest.mark.parametrize("widths", ((9,), (12, 9), (12, 10, 11, 9)), ids=str)
def test_heads(widths: tuple[int, ...]) -> None:
    check(make_problem((4,), widths, dtype=torch.bfloat16), chunk_rows=3, backend="triton")


@pytest.mark.parametrize("small", (False, True))
def test_tap_and_recomputation(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large batch, rows that are not visual are copied alone."""
    monkeypatch.setattr(triton_backend, "SMALL_COPY", 2**24 if small else 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = make_problem(visual_index=INDEX, dtype=dtype)
        residual = residual_like(problem.hidden)
        check_tap(problem, 0.37, residual, chunk_rows=3, backend="triton", compute_value=True)
        check(problem, factor=0.37, chunk_rows=3, backend="triton", recompute=True)


@pytest.mark.parametrize(("chunk_rows", "chunks"), ((4, 1), (2, 2)))
def test_launches(chunk_rows: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large batch's tap with a residual, in their order; small ones have no copy_kernel."""
    from prereg_kernels.ops.backends.triton import (
        activation,
        copy,
        gather,
        loss,
        scatter,
        sums,
    )  # fmt: skip

    launched: list[str] = []

    def recorded(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *args, **kwargs)

    launch = gather.launch
    for module in (activation, copy, gather, loss, scatter, sums):
        monkeypatch.setattr(module, "launch", recorded)
    chunk = [
        "gather_kernel", "activate_kernel", "loss_row_kernel", "sum_partials_kernel",
        "activation_backward_kernel", "sum_partials_kernel", "scatter_kernel",
    ]  # fmt: skip
    problem = make_problem(visual_index=INDEX)
    for small in (False, True):
        monkeypatch.setattr(triton_backend, "SMALL_COPY", 2**24 if small else 0)
        launched.clear()
        run_tap(
            problem, 0.5, residual_like(problem.hidden), chunk_rows=chunk_rows, backend="triton"
        )
        assert launched == ["copy_kernel"] * (not small) + chunk * chunks


def test_master_weights_and_no_tokens() -> None:
    problem = make_problem((4,), dtype=torch.bfloat16, weight_dtype=torch.float32, bias=False)
    check(problem, chunk_rows=3, backend="triton")
    empty = make_problem(visual_index=torch.empty(0, dtype=torch.int64))
    results = run(fused_pre_loss, empty, backend="triton")
    assert all(not value.any() for value in results.values())
