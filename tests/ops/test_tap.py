# SPDX-License-Identifier: Apache-2.0
"""pre_tap: an identity, whose scalar has PRe's gradient, and which holds nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap
from tests.helpers import check_tap, make_problem, relative_error, residual_like, run, run_tap


def value_of(problem) -> Tensor:
    with torch.no_grad():
        return fused_pre_loss(*problem.arguments(problem.leaves()), **problem.options)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("with_residual", (False, True))
@pytest.mark.parametrize("factor", (1.0, 0.5, -2.7))
def test_gradients(dtype: torch.dtype, with_residual: bool, factor: float) -> None:
    problem = make_problem((3, 50), (32, 24, 20), dtype=dtype, visual_mask=torch.rand(3, 50) < 0.5)
    residual = residual_like(problem.hidden) if with_residual else None
    check_tap(problem, factor, residual, chunk_rows=16)


def test_hidden_passes_unchanged() -> None:
    problem = make_problem((3, 5))
    leaves = problem.leaves()
    tapped, value = pre_tap(*problem.arguments(leaves))
    assert torch.equal(tapped, leaves["hidden"])
    assert tapped.dtype == leaves["hidden"].dtype and tapped.shape == leaves["hidden"].shape
    assert value.shape == () and value.dtype == torch.float32


def test_value_comes_with_backward() -> None:
    problem = make_problem((3, 5))
    tapped, value = pre_tap(*problem.arguments(problem.leaves()))
    assert value.item() == 0
    (tapped.sum() + 0.25 * value).backward()
    assert value.item() == value_of(problem).item() != 0


def test_value_at_once() -> None:
    problem = make_problem((3, 5))
    _, value = pre_tap(*problem.arguments(problem.leaves()), compute_value=True)
    assert value.item() == value_of(problem).item() != 0
    without = run_tap(problem, 2.0)
    with_value = run_tap(problem, 2.0, compute_value=True)
    assert all(torch.equal(without[name], with_value[name]) for name in without)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_value_out(dtype: torch.dtype) -> None:
    problem = make_problem((3, 5))
    out = torch.full((), 7.0, dtype=dtype)
    _, value = pre_tap(*problem.arguments(problem.leaves()), value_out=out)
    assert out.item() == 7.0
    value.backward(torch.tensor(0.125))
    assert out.item() == value_of(problem).to(dtype).item()


@pytest.mark.parametrize(
    "bad, exception, message",
    (
        (torch.zeros(1), ValueError, r"0-dim .* shape \(1,\)"),
        (torch.zeros((), requires_grad=True), ValueError, "requires_grad=True"),
        (torch.zeros((), dtype=torch.int64), ValueError, r"floating.* got torch\.int64"),
        (torch.zeros((), dtype=torch.complex64), ValueError, r"floating.* got torch\.complex64"),
        (torch.zeros((), device="meta"), ValueError, "on cpu.* on meta"),
        (0.0, TypeError, "a Tensor, got float"),
    ),
)
def test_value_out_is_checked(bad: Any, exception: type[Exception], message: str) -> None:
    problem = make_problem((3,))
    with pytest.raises(exception, match=f"value_out: expected .*{message}"):
        pre_tap(*problem.arguments(problem.leaves()), value_out=bad)


@pytest.mark.parametrize("compute_value", (False, True))
def test_backward_again_and_again(compute_value: bool) -> None:
    """With a weight that is multiplied in, and trained where the value is known."""
    problem = make_problem((9,))
    leaves = problem.leaves()
    tapped, value = pre_tap(*problem.arguments(leaves), compute_value=compute_value)
    w = torch.tensor(0.7, requires_grad=compute_value)
    total = w * value + 0.3 * tapped.square().sum()
    inputs = [*leaves.values(), w] if compute_value else list(leaves.values())
    runs = [torch.autograd.grad(total, inputs, retain_graph=again) for again in (True, True, False)]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))

    leaves = problem.leaves()
    loss = eager_pre_loss(*problem.arguments(leaves))
    total = 0.7 * loss + 0.3 * leaves["hidden"].square().sum()
    expected = [*torch.autograd.grad(total, list(leaves.values())), loss.detach()]
    for ours, x in zip(runs[0], expected, strict=False):
        assert relative_error(ours, x) < 2e-6
    assert relative_error(value.detach(), loss.detach()) < 2e-6


def test_backward_through_a_freed_graph_raises() -> None:
    problem = make_problem((9,))
    leaves = problem.leaves()
    value = pre_tap(*problem.arguments(leaves))[1]
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_an_anchor_that_changes_before_backward() -> None:
    problem = make_problem((9,))
    anchor = problem.anchor.clone()
    leaves = problem.leaves()
    hidden, _, *head = problem.arguments(leaves)
    value = pre_tap(hidden, anchor, *head)[1]
    anchor.mul_(2)
    with pytest.raises(RuntimeError, match="anchor: was modified in place"):
        value.backward()
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize("compute_value", (False, True))
def test_hidden_without_grad_stays_without(compute_value: bool) -> None:
    """A frozen model below the tap: the layers above need not run backward for it."""
    problem = make_problem((9,))
    everything = run_tap(problem, compute_value=compute_value)
    leaves = replace(problem, needs=frozenset(("W0", "b0", "W1", "b1"))).leaves()
    tapped, value = pre_tap(*problem.arguments(leaves), compute_value=compute_value)
    assert not tapped.requires_grad and value.requires_grad
    value.backward()
    assert all(torch.equal(leaves[x].grad, everything[f"d{x}"]) for x in ("W0", "b0", "W1", "b1"))


def test_unused_scalar_adds_nothing() -> None:
    problem = make_problem((3, 5))
    leaves = problem.leaves()
    tapped, value = pre_tap(*problem.arguments(leaves))
    (2 * tapped).sum().backward()
    assert torch.equal(leaves["hidden"].grad, torch.full_like(tapped, 2))
    assert leaves["W0"].grad is None
    assert value.item() == 0


def test_unused_hidden_gets_the_gradient() -> None:
    problem = make_problem((3, 5))
    assert torch.equal(run_tap(problem)["dhidden"], run(fused_pre_loss, problem)["dhidden"])


def test_without_grad_it_is_the_identity() -> None:
    problem = make_problem((3, 5))
    with torch.no_grad():
        tapped, value = pre_tap(*problem.arguments(problem.leaves()))
    assert torch.equal(tapped, problem.hidden)
    assert value.item() == 0 and not value.requires_grad


def test_nothing_is_held_but_hidden_and_the_head() -> None:
    problem = make_problem((64,), (32, 24, 20))
    leaves = problem.leaves()
    known = {x.untyped_storage().data_ptr() for x in leaves.values()}
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        pre_tap(*problem.arguments(leaves))
    assert {x.untyped_storage().data_ptr() for x in packed} == known
    others = [x for x in packed if x.untyped_storage().data_ptr() not in known]
    assert sum(x.numel() * x.element_size() for x in others) == 0


def test_the_schedule_with_forward_holds_its_gradients_and_recompute_none() -> None:
    problem = make_problem((64,), (32, 24, 20))
    held = {}
    for recompute in (False, True):
        leaves = problem.leaves()
        given = [*leaves.values(), problem.anchor]
        known = {x.untyped_storage().data_ptr() for x in given}
        packed: dict[int, int] = {}

        def pack(x: Tensor, known: set[int] = known, packed: dict[int, int] = packed) -> Tensor:
            if x.untyped_storage().data_ptr() not in known:
                packed[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            fused_pre_loss(*problem.arguments(leaves), recompute=recompute)
        held[recompute] = sum(packed.values())
    coefficients = 64 * 4
    gradients = sum(x.numel() * 4 for x in problem.leaves().values())
    assert held[True] <= coefficients
    assert gradients <= held[False] <= gradients + 2 * coefficients


@pytest.mark.parametrize("compute_value", (False, True))
def test_inside_checkpointing(compute_value: bool) -> None:
    """A checkpointed block runs twice, and its loss counts once."""
    problem = make_problem((10,), (6, 8, 7))
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))

    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        leaves = problem.leaves()

        def block(x: Tensor) -> tuple[Tensor, Tensor]:
            _, anchor, weights, biases = problem.arguments(leaves)
            options = {"compute_value": compute_value, "visual_index": torch.arange(0, 10, 2)}
            tapped, value = pre_tap(torch.tanh(x @ weight), anchor, weights, biases, **options)
            return torch.tanh(tapped), value

        if checkpointed:
            out, value = checkpoint(block, leaves["hidden"], use_reentrant=False)
        else:
            out, value = block(leaves["hidden"])
        (out.square().sum() + 0.5 * value).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    plain, recomputed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert plain["W0"].abs().max() > 0


def test_several_taps_in_a_chain() -> None:
    problem = make_problem((10,), (6, 8, 6), dtype=torch.float64)

    def gradients(tapped: bool) -> dict[str, Tensor]:
        leaves = problem.leaves()
        _, anchor, weights, biases = problem.arguments(leaves)
        x, total = leaves["hidden"], 0.0
        for layer in range(3):
            if tapped:
                x, value = pre_tap(x, anchor, weights, biases)
            else:
                value = eager_pre_loss(x, anchor, weights, biases)
            total = total + (layer + 1) * value
            x = torch.sin(x)
        (x.sum() + total).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    ours, expected = gradients(True), gradients(False)
    assert max(relative_error(ours[name], expected[name]) for name in ours) < 1e-6
