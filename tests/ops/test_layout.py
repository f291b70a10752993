# SPDX-License-Identifier: Apache-2.0
"""layout="sbh": bitwise what the same call gives on (B, S, D), and no copy of the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import PReHead, eager_pre_loss, fused_pre_loss, pre_tap
from prereg_kernels.ops import custom_ops
from tests.helpers import Problem, check, check_tap, make_problem, residual_like, run, run_tap

BATCH, LENGTH, WIDTHS = 3, 50, (32, 24, 20)
SELECTIONS = ("mask", "index", "everything")


def sequence_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def problems(selection: str, rows: bool = False, **options: Any) -> tuple[Problem, Problem]:
    """The same problem, (B, S, D) and (S, B, D); `rows`: the anchor is one a visual token."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.4
    index = torch.randperm(BATCH * LENGTH, generator=generator)[:60]
    options |= {"mask": {"visual_mask": mask}, "index": {"visual_index": index}}.get(selection, {})
    plain = make_problem((BATCH, LENGTH), WIDTHS, **options)
    if rows:
        flat = plain.anchor.flatten(0, 1)
        plain = replace(plain, anchor=flat[mask.flatten() if selection == "mask" else index])
    turned = replace(
        plain,
        hidden=sequence_first(plain.hidden),
        anchor=plain.anchor if rows else sequence_first(plain.anchor),
    )
    return plain, turned.with_options(layout="sbh")


def assert_same(plain: dict[str, Tensor], turned: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert plain.keys() == turned.keys()
    for name, x in plain.items():
        y = turned[name].transpose(0, 1) if name == "dhidden" else turned[name]
        assert torch.equal(x, y), name


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize(
    "selection, rows",
    (*((each, False) for each in SELECTIONS), ("mask", True), ("index", True)),
)
def test_the_tap(selection: str, rows: bool, residual: bool, dtype: torch.dtype) -> None:
    plain, turned = problems(selection, rows, dtype=dtype)
    other = residual_like(plain.hidden) if residual else None
    chunks = {"chunk_rows": 16}
    results = run_tap(plain, -0.7, other, **chunks)
    other = None if other is None else sequence_first(other)
    assert_same(results, run_tap(turned, -0.7, other, **chunks))
    assert results["dW0"].norm() > 0


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    "function, options",
    (
        (fused_pre_loss, {}),
        (fused_pre_loss, {"recompute": True}),
        (fused_pre_loss, {"reduction": "none"}),
        (eager_pre_loss, {}),
        (eager_pre_loss, {"reduction": "none"}),
    ),
)
def test_the_loss(function: Callable[..., Tensor], options: dict[str, Any], selection: str) -> None:
    plain, turned = problems(selection)
    assert_same(run(function, plain, **options), run(function, turned, **options))


@pytest.mark.parametrize("weights", ("leading", "tokens"))
def test_token_weights(weights: str) -> None:
    """(B, S), as the mask."""
    plain, turned = problems("mask")
    count = (BATCH, LENGTH) if weights == "leading" else (int(plain.options["visual_mask"].sum()),)
    token_weight = torch.rand(count, generator=torch.Generator().manual_seed(2))
    options = {"token_weight": token_weight, "denominator": 7.0}
    assert_same(run_tap(plain, **options), run_tap(turned, **options))


def test_truth() -> None:
    """By the rule, against float64."""
    _, turned = problems("mask", dtype=torch.bfloat16)
    check_tap(turned, 0.5, residual_like(turned.hidden))
    check(turned)


def test_a_head() -> None:
    head, (plain, turned) = PReHead(32, 20, 24, seed=0), problems("mask")
    found = []
    for problem in (plain, turned):
        head.zero_grad()
        hidden = problem.hidden.clone().requires_grad_()
        tapped, value = head.tap(hidden, problem.anchor, **problem.options)
        assert tapped.shape == hidden.shape and torch.equal(tapped, hidden)
        (tapped.sum() + 0.5 * value).backward()
        assert hidden.grad is not None
        found.append([p.grad for p in head.parameters()] + [hidden.grad])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y if x.shape == y.shape else y.transpose(0, 1))


@pytest.mark.parametrize("selection", ("mask", "index"))
def test_nothing_is_copied(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline reads the caller's memory, and what it writes is (S, B, D) as well."""
    seen = []
    pipeline = custom_ops.losses_and_gradients

    def see(problem: Any, *args: Any) -> Any:
        seen.append((problem, args[-1]))
        return pipeline(problem, *args)

    monkeypatch.setattr(custom_ops, "losses_and_gradients", see)
    _, turned = problems(selection)
    hidden, other = turned.hidden.clone().requires_grad_(), torch.randn_like(turned.hidden)
    leaves = turned.leaves() | {"hidden": hidden}
    tapped, value = pre_tap(*turned.arguments(leaves), **turned.options)
    torch.autograd.backward([tapped, value], [other, torch.tensor(1.0)])
    [(problem, residual)] = seen
    assert problem.hidden.data_ptr() == hidden.data_ptr()
    assert problem.anchor.data_ptr() == turned.anchor.data_ptr()
    assert residual.data_ptr() == other.data_ptr()
    assert tapped.data_ptr() == hidden.data_ptr() and tapped.is_contiguous()
    assert hidden.grad is not None and hidden.grad.is_contiguous()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_compiled(selection: str) -> None:
    plain, turned = problems(selection)
    expected = run_tap(plain, 2.0, residual_like(plain.hidden))
    torch._dynamo.reset()

    def tap(*args: Any, **options: Any) -> Any:
        return pre_tap(*args, **options)

    compiled = torch.compile(tap, backend="aot_eager", fullgraph=True)
    leaves = turned.leaves()
    value_out = torch.zeros(())
    tapped, value = compiled(*turned.arguments(leaves), value_out=value_out, **turned.options)
    other = sequence_first(residual_like(plain.hidden))
    torch.autograd.backward([tapped, value], [other, torch.tensor(2.0)])
    ours = {f"d{name}": x.grad for name, x in leaves.items()} | {"loss": value_out}
    assert_same(expected, ours)


@pytest.mark.parametrize("function", (fused_pre_loss, eager_pre_loss, pre_tap))
def test_errors(function: Callable[..., Any]) -> None:
    hidden, anchor = torch.ones(5, 2, 4), torch.zeros(5, 2, 4)
    with pytest.raises(ValueError, match="layout: expected one of bsh, sbh; got 'sbhd'"):
        function(hidden, anchor, layout="sbhd")
    with pytest.raises(ValueError, match=r"hidden: expected shape \(S, B, D\) .* got \(5, 4\)"):
        function(hidden[:, 0], anchor[:, 0], layout="sbh")
    mask = torch.ones(5, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"visual_mask: .* \(2, 5\), got \(5, 2\)"):
        function(hidden, anchor, layout="sbh", visual_mask=mask)
