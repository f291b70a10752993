# SPDX-License-Identifier: Apache-2.0
"""PReHead: parameters, their initialisation, and the two calls."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from prereg_kernels import PReHead, eager_pre_loss, fused_pre_loss
from prereg_kernels._util import private
from tests.helpers import relative_error


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(3, 5, size, generator=generator) for size in (8, 6))
    return next(draws), next(draws)


@pytest.mark.parametrize("depth, count", ((1, 2), (2, 4), (3, 6)))
def test_parameters(depth: int, count: int) -> None:
    head = PReHead(8, 6, 10, depth=depth)
    widths = [8, *[10] * (depth - 1), 6]
    assert [tuple(w.shape) for w in head.weights] == list(zip(widths[1:], widths, strict=False))
    assert [b.shape[0] for b in head.biases] == widths[1:]
    assert len(list(head.parameters())) == len(list(head.parameters(recurse=False))) == count
    assert PReHead(8, 6, depth=depth, bias=False).biases == [None] * depth


def test_no_head() -> None:
    head = PReHead(6, 6, depth=0)
    hidden = problem()[1]
    assert list(head.parameters()) == []
    assert head(hidden, hidden).item() == pytest.approx(-1)


def test_initialisation_is_that_of_linear() -> None:
    torch.manual_seed(5)
    head = PReHead(400, 300, 200)
    for weight, bias in zip(head.weights, head.biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        for ours, theirs in ((weight, linear.weight), (bias, linear.bias)):
            bound = weight.shape[1] ** -0.5
            assert ours.abs().max().item() <= bound
            assert ours.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert theirs.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    before = head.weight_0.detach().clone()
    head.reset_parameters()
    assert not torch.equal(before, head.weight_0)


def test_dtype_and_device() -> None:
    head = PReHead(8, 6, dtype=torch.bfloat16, device="meta")
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in head.parameters()} == {"meta"}


@pytest.mark.parametrize("activation", ("gelu", "relu"))
def test_forward_is_the_loss(activation: str) -> None:
    head, (hidden, anchor) = PReHead(8, 6, 10, activation=activation), problem()
    mask = torch.rand(3, 5) < 0.5
    options = {"visual_mask": mask, "loss": "mse", "reduction": "sum"}
    value = head(hidden, anchor, **options)
    arguments = (hidden, anchor, head.weights, head.biases)
    assert value.item() == fused_pre_loss(*arguments, activation=activation, **options).item()
    expected = eager_pre_loss(*arguments, activation=activation, **options)
    assert relative_error(value.detach(), expected.detach()) < 1e-6


def test_tap_runs_the_modules_hooks() -> None:
    head, (hidden, anchor) = PReHead(8, 6, 10), problem()
    calls = []
    head.register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    hidden.requires_grad_()
    tapped, value = head.tap(hidden, anchor)
    assert calls == [2]
    assert torch.equal(tapped, hidden)
    value.backward()
    gradients = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    head(hidden, anchor).backward()
    assert all(map(torch.equal, gradients, (p.grad for p in head.parameters())))
    assert min(g.abs().max().item() for g in gradients) > 0


def test_state_dict_roundtrip() -> None:
    first, second = PReHead(8, 6, 10), PReHead(8, 6, 10)
    second.load_state_dict(first.state_dict())
    assert list(first.state_dict()) == ["weight_0", "bias_0", "weight_1", "bias_1"]
    assert first(*problem()).item() == second(*problem()).item()


def test_repr_names_sizes() -> None:
    assert "[(10, 8), (6, 10)], activation='gelu'" in repr(PReHead(8, 6, 10))


def test_dynamo_sees_no_fsdp() -> None:
    """torch 2.15 breaks the graph at what FSDP manages, and calls no property to find out."""
    head = PReHead(4, 3)
    assert not inspect.getattr_static(head, private.FSDP_MANAGED, False)
    setattr(head, private.FSDP_MANAGED, True)
    assert inspect.getattr_static(head, private.FSDP_MANAGED, False) is True
