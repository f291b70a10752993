"""pre_tap: an identity, whose scalar has PRe's gradient, and which holds nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap
from tests.helpers import check_tap, make_problem, relative_error, residual_like, run, run_tap


def value_of(problem) -> Tensor:
    with torch.no_grad():
        return fused_pre_loss(*problem.arguments(problem.leaves()), **problem.options)


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


def test_value_out() -> None:
    problem = make_problem((3, 5))
    out = torch.full((), 7.0)
    _, value = pre_tap(*problem.arguments(problem.leaves()), value_out=out)
    assert out.item() == 7.0
    value.backward(torch.tensor(0.125))
    assert out.item() == value_of(problem).item()


@pytest.mark.parametrize("bad", (torch.zeros(1), torch.zeros((), requires_grad=True)))
def test_value_out_is_checked(bad: Tensor) -> None:
    problem = make_problem((3,))
    with pytest.raises(ValueError, match="value_out: expected a 0-dim Tensor"):
        pre_tap(*problem.arguments(problem.leaves()), value_out=bad)


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
