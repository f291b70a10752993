# SPDX-License-Identifier: Apache-2.0
"""The rule of the other tests notices wrong formulas: each mutation here has to break it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import fused_pre_loss
from prereg_kernels.ops import dtypes, loss_gradients, pipeline
from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.torch import TorchBackend
from prereg_kernels.ops.losses import LOSSES
from tests.helpers import (
    Problem,
    assert_as_good_as_eager,
    check,
    check_tap,
    make_problem,
    residual_like,
    run,
)

activation_backward = TorchBackend.activation_backward
token_losses = TorchBackend.token_losses
scatter_rows = TorchBackend.scatter_rows
standardize = loss_gradients._standardize
cosine = loss_gradients.cosine


def on_dz(change: Callable[..., None]) -> Callable[..., None]:
    """token_losses, after which `change` spoils dz."""

    def mutant(self: TorchBackend, chunk: LossChunk, spec: Any) -> None:
        kept = chunk.z.clone()
        token_losses(self, chunk, spec)
        if chunk.dz is not None:
            change(chunk.dz, kept, chunk.coefficient, chunk.losses)

    return mutant


def drop_second_term(dz: Tensor, z: Tensor, coefficient: Tensor, c: Tensor) -> None:
    """Leave -t / (nt nz) of dz = -(t / nt - c z / nz) / nz; the loss is -c."""
    norm = z.norm(dim=1, keepdim=True)
    dz += z * (coefficient * c).unsqueeze(1) / norm**2


def drop_mean(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    p, inverse_std = standardize(x, eps)
    return p + x.mean(dim=1, keepdim=True) * inverse_std, inverse_std


COSINE = {"loss": "cosine", "normalize": "none"}
MUTATIONS: dict[str, tuple[str, Callable[..., Any], dict[str, str]]] = {
    "sign of dz": ("token_losses", on_dz(lambda dz, *_: dz.neg_()), COSINE),
    "c z / nz missing": ("token_losses", on_dz(drop_second_term), COSINE),
    "1/N twice": (
        "token_losses",
        on_dz(lambda dz, z, coefficient, _: dz.mul_(coefficient.unsqueeze(1))),
        COSINE,
    ),
    "dz too large by 1e-5": (
        "token_losses", on_dz(lambda dz, *_: dz.mul_(1.00001)), COSINE,
    ),
    "sign of mse": (
        "token_losses",
        on_dz(lambda dz, *_: dz.neg_()),
        {"loss": "mse", "normalize": "l2"},
    ),
    "act' missing": ("activation_backward", lambda *_: None, COSINE),
    "wrong act'": (
        "activation_backward",
        lambda self, dg, u, bias, activation, sums: activation_backward(
            self, dg, u, bias, "silu", sums
        ),
        COSINE,
    ),
    "wrong act": (
        "activate", lambda self, u, bias, activation, g: torch.ops.aten.silu.out(u, out=g), COSINE,
    ),
    "db1 missing": (
        "activation_backward",
        lambda self, *others: (activation_backward(self, *others), others[-1].zero_()),
        COSINE,
    ),
    "db2 missing": (
        "token_losses",
        lambda self, chunk, spec: (token_losses(self, chunk, spec), chunk.sums.zero_()),
        COSINE,
    ),
    "dh not scattered": ("scatter_rows", lambda *_: None, COSINE),
    "dh at wrong rows": (
        "scatter_rows",
        lambda self, values, *others: scatter_rows(self, values.flip(0), *others),
        COSINE,
    ),
    "residual lost": (
        "scatter_rows",
        lambda self, *others: scatter_rows(self, *others[:-1], None),
        COSINE,
    ),
    "residual added twice": (
        "scatter_rows",
        lambda self, values, into, index, scale, residual: scatter_rows(
            self, values, into, index, scale, None if residual is None else 2 * residual
        ),
        COSINE,
    ),
    "other rows not started": (
        "start_rows", lambda self, into, index, residual: into.fill_(0.5), COSINE,
    ),
    "other rows without the residual": (
        "start_rows", lambda self, into, index, residual: (into.zero_(), residual)[1], COSINE,
    ),
}  # fmt: skip


def problem(options: dict[str, str]) -> Any:
    index = torch.tensor([9, 2, 5, 0, 7, 3])
    return make_problem((12,), (10, 8, 9), visual_index=index, eps=4.0, **options)


def check_both(given: Problem) -> None:
    """The rule for the loss and the tap, in chunks, with another gradient to add."""
    check(given, chunk_rows=4, backend="torch")
    residual = residual_like(given.hidden)
    check_tap(given, residual=residual, chunk_rows=4, backend="torch")


@pytest.mark.parametrize("options", ({**COSINE}, {"loss": "mse", "normalize": "layer"}))
def test_without_a_mutation_the_rule_holds(options: dict[str, str]) -> None:
    check_both(problem(options))


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_rule_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, mutant, options = MUTATIONS[name]
    monkeypatch.setattr(TorchBackend, target, mutant)
    with pytest.raises(AssertionError, match="error"):
        check_both(problem(options))


def test_the_rule_notices_a_mean_that_is_not_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_gradients, "_standardize", drop_mean)
    with pytest.raises(AssertionError, match="error"):
        check_both(problem({"loss": "mse", "normalize": "layer"}))


def test_the_rule_notices_an_ignored_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_eps(z: Tensor, t: Tensor, how: str, eps: float, grad: bool) -> Any:
        return cosine(z, t, how, 1e-30, grad)

    monkeypatch.setitem(vars(LOSSES.find("cosine")), "by_hand", without_eps)
    with pytest.raises(AssertionError, match="error"):
        check_both(problem(COSINE))


def test_the_rule_notices_a_dropped_layer_norm_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient's own mean, dp.mean(), which no primitive holds alone."""
    wrong = on_dz(lambda dz, *_: dz.add_(dz.abs().mean(dim=1, keepdim=True)))
    monkeypatch.setattr(TorchBackend, "token_losses", wrong)
    with pytest.raises(AssertionError, match="error"):
        check_both(problem({"loss": "mse", "normalize": "layer"}))


def test_the_rule_notices_a_lost_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 the gradients are computed at another scale, which has to be undone."""
    monkeypatch.setattr(dtypes, "_native_on_cpu", lambda _: True)
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
