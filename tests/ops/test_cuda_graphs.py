# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: calls with a mask are never captured, those with an index may be."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import fused_pre_loss, pre_tap
from prereg_kernels.attach.hooks import _lasting
from prereg_kernels.ops import custom_ops
from tests.cuda_graphs import Inspector, Verdict
from tests.helpers import make_problem
from tests.ops.test_compile import options_of


def loss(*arguments: Any, **options: Any) -> Tensor:
    return fused_pre_loss(*arguments, **options)


def recomputed(*arguments: Any, **options: Any) -> Tensor:
    return fused_pre_loss(*arguments, recompute=True, **options)


def tap(*arguments: Any, **options: Any) -> Tensor:
    tapped, value = pre_tap(*arguments, compute_value=True, **options)
    return tapped.square().sum() + value


def verdicts_on(function: Callable[..., Tensor], selector: str) -> list[Verdict]:
    torch._dynamo.reset()
    problem, inspector = make_problem((3, 5), **options_of(selector)), Inspector()
    arguments = problem.arguments(problem.leaves())
    call = torch.compile(function, fullgraph=True, backend=inspector)
    call(*arguments, **problem.options).backward()
    assert [verdict.is_backward for verdict in inspector.verdicts] == [False, True]
    return inspector.verdicts


@pytest.mark.parametrize("function", (loss, recomputed, tap))
@pytest.mark.parametrize("selector", ("visual_index", ""))
def test_may_be_captured(function: Callable[..., Tensor], selector: str) -> None:
    found = verdicts_on(function, selector)
    assert any(verdict.ops for verdict in found)
    for verdict in found:
        assert verdict.unsafe is None and verdict.mutation is None


@pytest.mark.parametrize("function", (loss, recomputed, tap))
def test_masked_calls_are_not_captured(function: Callable[..., Tensor]) -> None:
    for verdict in verdicts_on(function, "visual_mask"):
        assert verdict.unsafe in {f"prereg.{op}.default" for op in verdict.ops} or (
            not verdict.ops and verdict.unsafe is None
        )
        assert all(op.startswith("masked_") for op in verdict.ops)
        assert verdict.mutation is None


@pytest.mark.parametrize("kept", (True, False))
def test_values_that_graphs_write_keep_their_address(kept: bool) -> None:
    """As those of a model that is compiled whole. Else a forward that writes one has no graph."""
    torch._dynamo.reset()
    values, inspector = {1: torch.zeros(())}, Inspector()
    if kept:
        values = _lasting([1], torch.device("cpu"))

    def forward(x: Tensor) -> Tensor:
        values[1].copy_(x.detach().sum())
        return x.sin()

    torch.compile(forward, fullgraph=True, backend=inspector)(torch.ones(3, requires_grad=True))
    [verdict] = inspector.verdicts
    assert (verdict.mutation is None) == kept
    assert values[1] == 3


def test_a_mask_refuses_capture_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is captured, and before torch had the tag."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    mask: Any = SimpleNamespace(is_cuda=True)
    with pytest.raises(RuntimeError, match=r"^visual_mask: cannot be captured .* visual_index$"):
        custom_ops._counted(mask)


def test_a_mask_that_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    places = torch.tensor([[1], [4]])
    mask: Any = SimpleNamespace(is_cuda=True, nonzero=lambda: places)
    assert custom_ops._counted(mask).tolist() == [1, 4]
