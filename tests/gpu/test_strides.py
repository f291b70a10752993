# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not contiguous, inputs and incoming gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prereg_kernels import fused_pre_loss
from tests.gpu.support import each_backend, gpu_problem, needs_gpu
from tests.helpers import Problem, check, check_tap, residual_like

pytestmark = needs_gpu


def every_other_column(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def padded_rows(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wide[..., :-3] = x
    return wide[..., :-3]


LAYOUTS = (every_other_column, transposed, padded_rows)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


class Laid(Problem):
    """A problem whose siblings keep the strides too."""

    def sibling(self, seed: int) -> Problem:
        other = super().sibling(seed)
        hidden, anchor = (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(y)
            for x, y in ((self.hidden, other.hidden), (self.anchor, other.anchor))
        )
        return replace(other, hidden=hidden, anchor=anchor)


@each_backend
@each_layout
@pytest.mark.parametrize("indexed", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_inputs(backend: str, layout: object, indexed: bool, dtype: torch.dtype) -> None:
    problem = gpu_problem(129, indexed=indexed, dtype=dtype)
    hidden, anchor = layout(problem.hidden), layout(problem.anchor)
    laid = Laid(hidden, anchor, problem.weights, problem.biases, problem.options)
    assert not laid.hidden.is_contiguous()
    check(laid, backend=backend)


@each_backend
@each_layout
def test_gradient_from_the_later_layers(backend: str, layout: object) -> None:
    problem = gpu_problem(129, dtype=torch.bfloat16)
    check_tap(problem, 0.5, layout(residual_like(problem.hidden)), backend=backend)


@each_backend
def test_gradient_of_single_losses(backend: str) -> None:
    problem = gpu_problem(129, dtype=torch.float32, reduction="none")

    def gradients(upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = problem.leaves()
        losses = fused_pre_loss(*problem.arguments(leaves), **problem.options, backend=backend)
        return torch.autograd.grad(losses, list(leaves.values()), upstream)

    one = torch.ones((), device=problem.hidden.device)
    for upstream in (one.expand(129), torch.arange(258.0, device=one.device)[::2]):
        assert not upstream.is_contiguous()
        pairs = zip(gradients(upstream), gradients(upstream.contiguous()), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
