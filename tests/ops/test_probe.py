# SPDX-License-Identifier: Apache-2.0
"""TapProbe: the gradients that meet in a tap, by eager code in float64 that keeps them apart."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import eager_pre_loss, pre_tap
from prereg_kernels.ops.probe import TapProbe
from tests.helpers import Problem, make_problem, residual_like, run_tap

FACTOR = -2.7
GENERATOR = torch.Generator().manual_seed(0)
MASK = torch.rand(3, 50, generator=GENERATOR) < 0.5
WEIGHT = torch.rand(3, 50, generator=GENERATOR)


def definition(problem: Problem, residual: Tensor | None, rows: Tensor | None) -> Tensor:
    """(3,), float64."""
    leaves = problem.leaves(torch.float64)
    loss = eager_pre_loss(
        *problem.arguments(leaves, torch.float64), **problem.options, upcast=torch.float64
    )
    [p] = torch.autograd.grad(FACTOR * loss, leaves["hidden"])
    g = torch.zeros_like(p) if residual is None else residual.double()
    p, g = p.flatten(0, -2), g.flatten(0, -2)
    if rows is not None:
        p, g = p[rows], g[rows]
    return torch.stack([g.square().sum(), p.square().sum(), (g * p).sum()])


def rows_of(options: dict[str, Any]) -> Tensor | None:
    if "visual_mask" in options:
        return options["visual_mask"].flatten().nonzero().squeeze(1)
    return options.get("visual_index")


@pytest.mark.parametrize("dtype, tolerance", (
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3),
))  # fmt: skip
@pytest.mark.parametrize("options", (
    {}, {"visual_mask": MASK}, {"visual_index": torch.tensor([99, 3, 40])},
    {"visual_mask": MASK, "token_weight": WEIGHT, "denominator": 7.0},
))  # fmt: skip
@pytest.mark.parametrize("with_residual", (False, True))
def test_sums(
    dtype: torch.dtype, tolerance: float, options: dict[str, Any], with_residual: bool
) -> None:
    """Only visual tokens count, and nothing else of the backward pass is other than without."""
    problem = make_problem((3, 50), (32, 24, 20), dtype=dtype, **options)
    residual = residual_like(problem.hidden) if with_residual else None
    probe = TapProbe()
    probed = run_tap(problem, FACTOR, residual, chunk_rows=16, probe=probe)
    plain = run_tap(problem, FACTOR, residual, chunk_rows=16)
    assert all(torch.equal(probed[name], plain[name]) for name in plain)
    expected = definition(problem, residual, rows_of(options))
    assert probe.sums is not None
    sizes = torch.stack([*expected[:2], (expected[0] * expected[1]).sqrt()])  # g . p may cancel
    assert ((probe.sums.double() - expected).abs() <= tolerance * sizes).all()


def test_a_row_of_the_anchor_for_each_token() -> None:
    index = torch.tensor([99, 3, 40])
    problem = make_problem((3, 50), (32, 24, 20), dtype=torch.float64, visual_index=index)
    leaves, probe = problem.leaves(), TapProbe()
    hidden, anchor, *head = problem.arguments(leaves)
    rows = anchor.flatten(0, 1)[index]
    tapped, loss = pre_tap(hidden, rows, *head, visual_index=index, probe=probe)
    (tapped.sum() + FACTOR * loss).backward()
    expected = definition(problem, torch.ones_like(hidden), index)
    torch.testing.assert_close(probe.sums, expected, rtol=1e-12, atol=0)


def test_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tap's work, the probe's own left out; none before there was any."""
    problem, probe = make_problem((3, 50)), TapProbe()
    assert probe.seconds() is None
    see = TapProbe.see

    def slow(self: TapProbe, *args: Any) -> None:
        time.sleep(0.5)
        see(self, *args)

    monkeypatch.setattr(TapProbe, "see", slow)
    start = time.perf_counter()
    run_tap(problem, 1.0, probe=probe)
    seconds = probe.seconds()
    assert seconds is not None
    assert 0 < seconds < time.perf_counter() - start - 0.5


def test_no_gradient_for_the_states() -> None:
    problem, probe = make_problem((3, 5)), TapProbe()
    hidden, *others = problem.arguments(problem.leaves())
    pre_tap(hidden.detach(), *others, probe=probe)[1].backward()
    assert probe.sums is None


def test_it_is_checked() -> None:
    arguments = make_problem((3, 5)).arguments(make_problem((3, 5)).leaves())
    with pytest.raises(TypeError, match="probe: expected a TapProbe, got bool"):
        pre_tap(*arguments, probe=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"probe: expected None under torch\.compile, .* torch"):
        torch.func.grad(lambda x: pre_tap(x, *arguments[1:], probe=TapProbe())[1])(arguments[0])
