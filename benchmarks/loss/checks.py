# SPDX-License-Identifier: Apache-2.0
"""Correctness of what the benchmarks time, before it is timed.

Ours: the tests' rule (error against float64 truth at most eager's in the same dtype) on a slice of
a thousand rows, at the widths that are timed. Everybody: the same function at the full size, where
a tenfold error is forgiven; Liger's scheme accumulates in bfloat16, say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.loss.cases import Case, Tensors, make_tensors
from benchmarks.loss.peers import Loss, Peer
from benchmarks.loss.work import Work
from prereg_kernels import eager_pre_loss
from prereg_kernels.ops.dtypes import operand_dtype
from tests.helpers import (
    Problem,
    assert_as_good_as_eager,
    relative_error,
    residual_like,
    run,
    run_truth,
)

SLICE_ROWS = 1000
FEW_ROWS = 64
LARGEST_FULL_CHECK = 20_000  # rows: float64 truth of more does not fit beside the rest
FACTOR, SLACK = 10.0, 1e-3


class WrongResultError(Exception):
    """A peer computes something else."""


class DeviceProblem(Problem):
    """The tests' problem, its siblings drawn on the device: the widths here are large."""

    def sibling(self, seed: int) -> Problem:
        """The same problem with every value changed by up to a tenth."""
        generator = torch.Generator(self.hidden.device).manual_seed(seed)

        def change(x: Tensor) -> Tensor:
            factors = torch.rand(x.shape, generator=generator, device=x.device)
            return x * (0.9 + 0.2 * factors).to(x.dtype)

        return replace(
            self,
            hidden=change(self.hidden),
            anchor=change(self.anchor),
            weights=[change(weight) for weight in self.weights],
            biases=[change(bias) for bias in self.biases or [] if bias is not None],
        )


def as_problem(tensors: Tensors) -> DeviceProblem:
    """The tensors, in the form that the tests' rule takes."""
    return DeviceProblem(
        tensors.hidden.detach(),
        tensors.anchor,
        [weight.detach() for weight in tensors.weights],
        [bias.detach() for bias in tensors.biases],
        {"visual_index": tensors.visual_index},
    )


def check_slice(peer: Peer, case: Case, device: torch.device) -> None:
    """The tests' rule.

    Raises:
        WrongResultError: it is broken.
    """
    rows = min(case.tokens, SLICE_ROWS)
    problem = as_problem(make_tensors(replace(case, tokens=rows), device, seed=1))
    loss = peer.loss()
    residual = residual_like(problem.hidden) / problem.hidden.numel() if peer.residual else None

    def results(problem: Problem) -> dict[str, Tensor]:
        if residual is not None:
            return _tapped(loss, problem, residual)
        with torch.set_grad_enabled(peer.grad):
            if peer.grad:
                return run(loss, problem)
            arguments = problem.arguments(problem.leaves())
            return {"loss": loss(*arguments, **problem.options)}

    try:
        if peer.grad:
            assert_as_good_as_eager(results, problem, residual=residual)
        else:
            _check_value(results(problem)["loss"], problem)
    except AssertionError as error:
        raise WrongResultError(str(error)) from error


def _tapped(loss: Loss, problem: Problem, residual: Tensor) -> dict[str, Tensor]:
    """What `run` gives, of a loss that passes the hidden states on."""
    leaves = problem.leaves()
    tapped, value = loss(*problem.arguments(leaves), **problem.options)
    names, wanted = zip(*leaves.items(), strict=True)
    gradients = torch.autograd.grad([value, tapped], wanted, [None, residual])
    named = zip(names, gradients, strict=True)
    return {"loss": value.detach()} | {f"d{name}": gradient for name, gradient in named}


def _check_value(loss: Tensor, problem: Problem) -> None:
    truth = run_truth(problem)["loss"]
    bound = relative_error(run(eager_pre_loss, problem)["loss"], truth)
    error = relative_error(loss, truth)
    assert error <= FACTOR * bound + SLACK, f"loss: error {error:.1e}, eager's {bound:.1e}"


@dataclass
class FullTruth:
    """The float64 results of a case, and how far eager's are from them."""

    truth: dict[str, Tensor]
    bounds: dict[str, float]

    def check(self, work: Work) -> dict[str, dict[str, float]]:
        """The errors of a peer's results, and eager's.

        Raises:
            WrongResultError: they are the results of another function.
        """
        errors = {
            name: relative_error(value, self.truth[name]) for name, value in work.results().items()
        }
        bad = [
            f"{name}: error {error:.1e}, eager's {self.bounds[name]:.1e}"
            for name, error in errors.items()
            if not error <= FACTOR * self.bounds[name] + SLACK
        ]
        if bad:
            raise WrongResultError("; ".join(bad))
        return {"errors": errors, "eager": {name: self.bounds[name] for name in errors}}


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CPU only emulates products of this dtype, which takes up to 500 times longer."""
    return operand_dtype(dtype, device) != dtype


def full_truth(case: Case, tensors: Tensors) -> FullTruth | None:
    """None where it is too large. Where eager would take minutes, its errors are of a few rows."""
    if case.tokens > LARGEST_FULL_CHECK:
        return None

    problem = few = as_problem(tensors)
    truth = few_truth = run_truth(problem)
    if is_emulated(case.dtype, tensors.hidden.device):
        few = as_problem(make_tensors(replace(case, tokens=FEW_ROWS), tensors.hidden.device))
        few_truth = run_truth(few)
    eager = run(eager_pre_loss, few)
    return FullTruth(truth, {n: relative_error(eager[n], few_truth[n]) for n in truth})
