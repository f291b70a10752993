# SPDX-License-Identifier: Apache-2.0
"""Problems on the GPU, for every test in this folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers import Problem, make_problem

DEVICE = torch.device("cuda")
BACKENDS = ("triton", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_gpu(problem: Problem) -> Problem:
    """The problem's tensors, moved, with their strides."""

    def move(x: Tensor) -> Tensor:
        return x.to(DEVICE)

    biases = problem.biases
    return replace(
        problem,
        hidden=move(problem.hidden),
        anchor=move(problem.anchor),
        weights=[move(weight) for weight in problem.weights],
        biases=biases and [b if b is None else move(b) for b in biases],
        options={k: move(v) if isinstance(v, Tensor) else v for k, v in problem.options.items()},
    )


def gpu_problem(
    tokens: int,
    widths: tuple[int, ...] = (96, 160, 128),
    *,
    indexed: bool = True,
    **options: object,
) -> Problem:
    """A problem with `tokens` visual tokens in no order, among twice as many positions."""
    if indexed:
        generator = torch.Generator().manual_seed(tokens)
        options["visual_index"] = torch.randperm(2 * tokens, generator=generator)[:tokens]
    leading = (2, tokens) if indexed else (tokens,)
    return on_gpu(make_problem(leading, widths, **options))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bitwise equal and finite results."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.isfinite().all(), f"{name}: not finite"
        assert torch.equal(value, second[name]), f"{name}: differs"
