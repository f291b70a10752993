"""The rule of the other tests notices wrong formulas: each mutation here has to break it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import fused_pre_loss, pipeline
from prereg_kernels.rows import torch_rows
from tests.helpers import (
    Problem,
    assert_as_good_as_eager,
    check,
    check_tap,
    make_problem,
    residual_like,
    run,
)

activation_backward = torch_rows.activation_backward
token_losses_and_grad = torch_rows.token_losses_and_grad
add_column_sums = torch_rows.add_column_sums
scatter_rows = torch_rows.scatter_rows
standardize = torch_rows._standardize
cosine = torch_rows._cosine


def on_dz(change: Callable[..., None]) -> Callable[..., Tensor]:
    """token_losses_and_grad, after which `change` spoils dz."""

    def mutant(z: Tensor, t: Tensor, coefficient: Tensor, spec: Any, dz: Tensor) -> Tensor:
        kept = z.clone()
        losses = token_losses_and_grad(z, t, coefficient, spec, dz)
        change(dz, kept, t, coefficient, losses)
        return losses

    return mutant


def drop_second_term(dz: Tensor, z: Tensor, t: Tensor, coefficient: Tensor, c: Tensor) -> None:
    """Leave -t / (nt nz) of dz = -(t / nt - c z / nz) / nz; the loss is -c."""
    norm = z.norm(dim=1, keepdim=True)
    dz += z * (coefficient * c).unsqueeze(1) / norm**2


def drop_mean(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    p, inverse_std = standardize(x, eps)
    return p + x.mean(dim=1, keepdim=True) * inverse_std, inverse_std


COSINE = {"loss": "cosine", "normalize": "none"}
MUTATIONS: dict[str, tuple[str, Callable[..., Any], dict[str, str]]] = {
    "sign of dz": ("token_losses_and_grad", on_dz(lambda dz, *_: dz.neg_()), COSINE),
    "c z / nz missing": ("token_losses_and_grad", on_dz(drop_second_term), COSINE),
    "1/N twice": (
        "token_losses_and_grad",
        on_dz(lambda dz, z, t, coefficient, _: dz.mul_(coefficient.unsqueeze(1))),
        COSINE,
    ),
    "dz too large by 1e-5": (
        "token_losses_and_grad", on_dz(lambda dz, *_: dz.mul_(1.00001)), COSINE,
    ),
    "sign of mse": (
        "token_losses_and_grad",
        on_dz(lambda dz, *_: dz.neg_()),
        {"loss": "mse", "normalize": "l2"},
    ),
    "act' missing": ("activation_backward", lambda dg, u, activation: dg, COSINE),
    "wrong act'": (
        "activation_backward", lambda dg, u, activation: activation_backward(dg, u, "silu"), COSINE,
    ),
    "wrong act": ("activate", lambda u, activation: torch.nn.functional.silu(u), COSINE),
    "db missing": ("add_column_sums", lambda into, values: None, COSINE),
    "db of half the rows": (
        "add_column_sums", lambda into, values: add_column_sums(into, values[::2]), COSINE,
    ),
    "dh not scattered": ("scatter_rows", lambda into, index, rows, values: None, COSINE),
    "dh at wrong rows": (
        "scatter_rows",
        lambda into, index, rows, values: scatter_rows(into, index, rows, values.flip(0)),
        COSINE,
    ),
    "mean not removed": ("_standardize", drop_mean, {"loss": "mse", "normalize": "layer"}),
    "eps ignored": ("_cosine", lambda z, t, eps, grad: cosine(z, t, 1e-30, grad), COSINE),
}  # fmt: skip


def problem(options: dict[str, str]) -> Any:
    index = torch.tensor([9, 2, 5, 0, 7, 3])
    return make_problem((12,), (10, 8, 9), visual_index=index, eps=4.0, **options)


@pytest.mark.parametrize("options", ({**COSINE}, {"loss": "mse", "normalize": "layer"}))
def test_without_a_mutation_the_rule_holds(options: dict[str, str]) -> None:
    check_tap(problem(options), residual=residual_like(problem(options).hidden), chunk_rows=4)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_rule_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, mutant, options = MUTATIONS[name]
    monkeypatch.setattr(torch_rows, target, mutant)
    for call in (check, check_tap):
        with pytest.raises(AssertionError, match="error"):
            call(problem(options), chunk_rows=4)


def test_the_rule_notices_a_dropped_layer_norm_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient's own mean, dp.mean(), which no primitive holds alone."""
    wrong = on_dz(lambda dz, *_: dz.add_(dz.abs().mean(dim=1, keepdim=True)))
    monkeypatch.setattr(torch_rows, "token_losses_and_grad", wrong)
    with pytest.raises(AssertionError, match="error"):
        check(problem({"loss": "mse", "normalize": "layer"}))


def test_the_rule_notices_a_lost_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 the gradients are computed at another scale, which has to be undone."""
    half = make_problem((12,), (10, 8, 9), dtype=torch.float16)
    check_tap(half)
    finish = pipeline._WeightGradients.finish
    monkeypatch.setattr(pipeline._WeightGradients, "finish", lambda self, _: finish(self, None))
    with pytest.raises(AssertionError, match=r"d[Wb].: error"):
        check_tap(half)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_rule_notices_rare_non_finite_values(value: float, dtype: torch.dtype) -> None:
    """Even where the problem itself has none, and only a sibling does."""
    given = make_problem((12,), (10, 8, 9), dtype=dtype)

    def rarely(problem: Problem) -> dict[str, Tensor]:
        results = run(fused_pre_loss, problem)
        if problem is not given:
            results["dW0"][0, 0] = value
        return results

    with pytest.raises(AssertionError, match="dW0: error infinite"):
        assert_as_good_as_eager(rarely, given)
