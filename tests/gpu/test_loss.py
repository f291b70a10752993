"""On a GPU: the same rule as on the CPU, no wait for the device, nothing held by the tap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prereg_kernels import fused_pre_loss, pre_tap
from tests.helpers import Problem, check, check_tap, make_problem, residual_like, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def on_gpu(problem: Problem) -> Problem:
    """The problem's tensors, moved."""

    def move(value: object) -> object:
        return value.cuda() if isinstance(value, Tensor) else value

    return replace(
        problem,
        hidden=problem.hidden.cuda(),
        anchor=problem.anchor.cuda(),
        weights=[weight.cuda() for weight in problem.weights],
        biases=None
        if problem.biases is None
        else [b if b is None else b.cuda() for b in problem.biases],
        options={name: move(value) for name, value in problem.options.items()},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 127, 128, 129, 1000))
@pytest.mark.parametrize("chunk_rows", (None, 64))
def test_as_good_as_eager(dtype: torch.dtype, rows: int, chunk_rows: int | None) -> None:
    index = torch.randperm(2 * rows)[:rows]
    problem = make_problem((2, rows), (96, 160, 128), dtype=dtype, visual_index=index)
    problem = on_gpu(problem)
    check(problem, chunk_rows=chunk_rows)
    check(problem, factor=0.37, chunk_rows=chunk_rows, recompute=True)
    check_tap(
        problem, 0.37, residual_like(problem.hidden), chunk_rows=chunk_rows, compute_value=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    problem = on_gpu(make_problem((2000,), (256, 256, 256), dtype=dtype))
    first = run(fused_pre_loss, problem, chunk_rows=512)
    for _ in range(20):
        again = run(fused_pre_loss, problem, chunk_rows=512)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_does_not_wait_for_the_device() -> None:
    index = torch.arange(0, 400, 2)
    problem = on_gpu(make_problem((400,), (64, 64, 64), visual_index=index))
    run(fused_pre_loss, problem)  # loads libraries, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fused_pre_loss, problem)
        run(fused_pre_loss, problem, recompute=True)
        leaves = problem.leaves()
        tapped, value = pre_tap(*problem.arguments(leaves), **problem.options)
        (tapped.float().sum() + value).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tap_holds_nothing() -> None:
    problem = on_gpu(make_problem((8192,), (512, 512, 512), dtype=torch.bfloat16))
    leaves = problem.leaves()
    arguments = problem.arguments(leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    _, value = pre_tap(*arguments)
    assert torch.cuda.memory_allocated() - before < 64 * 1024
    value.backward()
