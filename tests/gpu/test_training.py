# SPDX-License-Identifier: Apache-2.0
"""As training uses it: torch.compile, autocast, a gradient scaler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prereg_kernels import PReHead, fused_pre_loss, pre_tap
from tests.gpu.support import DEVICE, HALVES, each_backend, gpu_problem, needs_gpu
from tests.helpers import assert_as_good_as_eager, check, check_tap, residual_like, run

pytestmark = needs_gpu


def test_compiled_loss() -> None:
    torch._dynamo.reset()
    problem = gpu_problem(300, dtype=torch.bfloat16)

    def function(*arguments: object, **options: object) -> Tensor:
        return 2 * fused_pre_loss(*arguments, **options)

    compiled = torch.compile(function, fullgraph=True)
    plain, results = run(function, problem), run(compiled, problem)
    for name, value in plain.items():
        torch.testing.assert_close(results[name], value)


def test_compiled_tap() -> None:
    torch._dynamo.reset()
    problem = gpu_problem(300, dtype=torch.bfloat16)

    def function(leaves: dict[str, Tensor]) -> Tensor:
        tapped, value = pre_tap(*problem.arguments(leaves), **problem.options)
        return tapped.float().square().mean() + 0.5 * value

    gradients = []
    for call in (function, torch.compile(function, fullgraph=True)):
        leaves = problem.leaves()
        gradients.append(torch.autograd.grad(call(leaves), list(leaves.values())))
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain)


@each_backend
@pytest.mark.parametrize("autocast", HALVES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast(backend: str, autocast: torch.dtype, dtype: torch.dtype) -> None:
    problem = gpu_problem(300, dtype=dtype, weight_dtype=torch.float32)
    problem = replace(problem, autocast=autocast)
    check(problem, backend=backend, chunk_rows=128)
    check_tap(problem, 0.37, residual_like(problem.hidden), backend=backend)


@each_backend
def test_scaled_gradients(backend: str) -> None:
    """A scaler's factor in float16: unscaled, the gradients keep the rule."""
    scale = 2.0**14
    problem = gpu_problem(300, dtype=torch.float16, weight_dtype=torch.float32)

    def unscaled(problem: object) -> dict[str, Tensor]:
        results = run(fused_pre_loss, problem, scale, backend=backend)
        return {k: v if k == "loss" else v.double() / scale for k, v in results.items()}

    assert_as_good_as_eager(unscaled, problem)


@each_backend
def test_scaler_step(backend: str) -> None:
    torch.manual_seed(0)
    head = PReHead(96, 128, 160).to(DEVICE)
    hidden = torch.randn(300, 96, device=DEVICE, requires_grad=True)
    anchor = torch.randn(300, 128, device=DEVICE)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(DEVICE.type)
    losses = []
    for _ in range(5):
        with torch.autocast(DEVICE.type, torch.float16):
            loss = fused_pre_loss(hidden, anchor, head.weights, head.biases, backend=backend)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**16  # no step was skipped
    assert losses[-1] < losses[0]
