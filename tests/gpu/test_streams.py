# SPDX-License-Identifier: Apache-2.0
"""Nothing waits for the device; side streams, CUDA graphs and other GPUs are used correctly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import fused_pre_loss, pre_tap
from tests.gpu.support import assert_same, each_backend, gpu_problem, needs_gpu
from tests.helpers import Problem, make_problem, run, run_tap

pytestmark = needs_gpu


def tap_loss(*arguments: Any, **options: Any) -> Tensor:
    return pre_tap(*arguments, **options)[1]


each_loss = pytest.mark.parametrize("loss", (fused_pre_loss, tap_loss))


@each_backend
def test_does_not_wait_for_the_device(backend: str) -> None:
    problem = gpu_problem(400, (64, 64, 64))

    def everything() -> None:
        run(fused_pre_loss, problem, backend=backend)
        run(fused_pre_loss, problem, recompute=True, backend=backend)
        leaves = problem.leaves()
        tapped, value = pre_tap(*problem.arguments(leaves), **problem.options, backend=backend)
        (tapped.float().sum() + value).backward()

    everything()  # loads libraries, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
@each_loss
def test_side_stream(backend: str, loss: Callable[..., Tensor]) -> None:
    problem = gpu_problem(1000, (256, 256, 256), dtype=torch.bfloat16)
    expected = run(loss, problem, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # what the default stream would read too early
        torch.cuda._sleep(10_000_000)
        results = run(loss, problem, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(expected, results)


@each_backend
@each_loss
def test_graph(backend: str, loss: Callable[..., Tensor]) -> None:
    problem = gpu_problem(600, (256, 320, 256), dtype=torch.bfloat16)
    leaves = problem.leaves()
    values = [
        [problem.anchor.clone(), *(leaf.detach().clone() for leaf in leaves.values())],
        [problem.sibling(1).anchor, *problem.sibling(1).leaves().values()],
    ]

    def step() -> list[Tensor]:
        arguments = problem.arguments(leaves)
        value = loss(*arguments, **problem.options, chunk_rows=256, backend=backend)
        gradients = torch.autograd.grad(value, list(leaves.values()))
        return [value.detach(), *gradients]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    for new in values[::-1]:  # in the same memory
        with torch.no_grad():
            for x, value in zip((problem.anchor, *leaves.values()), new, strict=True):
                x.copy_(value)
        graph.replay()
        eager = step()
        assert all(torch.equal(a, b) for a, b in zip(results, eager, strict=True))


def test_launches_select_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = gpu_problem(40, dtype=torch.bfloat16)
    entered = []

    class Guard(torch.cuda.device):
        def __enter__(self) -> None:
            entered.append(self.idx)
            super().__enter__()

    monkeypatch.setattr(torch.cuda, "device", Guard)
    run(fused_pre_loss, problem, backend="triton")
    assert set(entered) == {torch.cuda.current_device()}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_backend
def test_other_device(backend: str) -> None:
    problem = gpu_problem(300, dtype=torch.bfloat16)

    def move(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.to("cuda:1")

    there = Problem(
        move(problem.hidden),
        move(problem.anchor),
        [move(weight) for weight in problem.weights],
        [move(bias) for bias in problem.biases],
        {name: move(value) for name, value in problem.options.items()},
    )
    assert torch.cuda.current_device() == 0
    for function in (
        lambda problem: run(fused_pre_loss, problem, backend=backend),
        lambda problem: run_tap(problem, backend=backend),
    ):
        here, results = function(problem), function(there)
        assert torch.cuda.current_device() == 0
        assert_same(here, {name: value.to("cuda:0") for name, value in results.items()})


def test_cpu_tensors_still_work() -> None:
    run(fused_pre_loss, make_problem((40,), (16, 16, 16)))
