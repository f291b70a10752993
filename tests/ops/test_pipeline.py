# SPDX-License-Identifier: Apache-2.0
"""The loop over chunks, and the scale of float16's gradients."""

from __future__ import annotations

import pytest
import torch

from prereg_kernels.ops import pipeline
from prereg_kernels.ops.backends.registry import choose_backend
from prereg_kernels.ops.head_tensors import Head
from prereg_kernels.ops.pipeline import Needs, losses_and_gradients, losses_only, power_of_two
from prereg_kernels.ops.spec import Spec
from tests.helpers import make_problem, relative_error, run_truth


@pytest.mark.parametrize("value", (0.0, 1e-8, 0.3, 0.5, 1.0, 7.0, -9.0))
def test_power_of_two_is_next_above(value: float) -> None:
    power = power_of_two(torch.tensor([value / 3, value])).item()
    assert power == 2 ** round(torch.tensor(power).log2().item())
    assert abs(value) < power <= max(2 * abs(value), 2.0 if value == 0 else 0)
    assert power_of_two(torch.zeros(0)).item() == 1


def call(chunk_rows: int, needs: Needs | None = None, residual: torch.Tensor | None = None):
    problem = make_problem((30,), (8, 9, 7), dtype=torch.float64)
    spec = Spec("gelu", "cosine", "none", 1e-8, torch.float64, chunk_rows)
    index = torch.arange(29, -1, -2)
    head = Head(problem.weights, problem.biases or [])
    needs = needs or Needs(True, [True] * 2, [True] * 2)
    backend = choose_backend("torch", torch.device("cpu"))
    flat = pipeline.Problem(problem.hidden, problem.anchor, index, index, head)
    coefficient = torch.full((15,), 1 / 15, dtype=torch.float64)
    problem = problem.with_options(visual_index=index)
    losses, gradients = losses_and_gradients(flat, spec, backend, coefficient, needs, residual)
    assert torch.equal(losses_only(flat, spec, backend), losses)
    return problem, losses, gradients


@pytest.mark.parametrize("chunk_rows", (1, 4, 15, 100))
def test_sums_over_chunks(chunk_rows: int) -> None:
    problem, losses, gradients = call(chunk_rows)
    truth = run_truth(problem)
    assert relative_error(losses.mean(), truth["loss"]) < 1e-12
    assert relative_error(gradients.hidden, truth["dhidden"]) < 1e-12
    for layer in range(2):
        assert relative_error(gradients.weights[layer], truth[f"dW{layer}"]) < 1e-12
        assert relative_error(gradients.biases[layer], truth[f"db{layer}"]) < 1e-12


def test_residual_is_added_and_left_alone() -> None:
    residual = torch.randn(30, 8, dtype=torch.float64)
    kept = residual.clone()
    plain, added = call(4)[2].hidden, call(4, residual=residual)[2].hidden
    assert relative_error(added, plain + kept) < 1e-15
    assert torch.equal(residual, kept)


def test_nothing_unneeded_is_computed() -> None:
    gradients = call(4, Needs(False, [False, True], [False, False]))[2]
    assert gradients.hidden is None and gradients.weights[0] is None
    assert gradients.biases == [None, None]
    assert torch.equal(gradients.weights[1], call(4)[2].weights[1])
