# SPDX-License-Identifier: Apache-2.0
"""What the host does for a call: the operators that it starts, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from prereg_kernels import fused_pre_loss, pre_tap
from prereg_kernels._util.private import DispatchMode
from prereg_kernels.ops import custom_ops

ROWS, TOKENS, WIDTH = 12, 8, 4


class Operators(DispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def count(tap: bool, chunks: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of a forward and backward pass in so many chunks, as if nobody looked at them."""
    monkeypatch.setattr(custom_ops, "is_plain", lambda *tensors: True)
    hidden, anchor, residual = (torch.randn(ROWS, WIDTH) for _ in range(3))
    weights = [torch.randn(WIDTH, WIDTH).requires_grad_() for _ in range(2)]
    biases = [torch.randn(WIDTH).requires_grad_() for _ in range(2)]
    leaves = [hidden.requires_grad_(), *weights, *biases]
    options = {"visual_index": torch.arange(TOKENS), "chunk_rows": TOKENS // chunks}
    with Operators() as operators:
        if tap:
            tapped, loss = pre_tap(hidden, anchor, weights, biases, backend="torch", **options)
            torch.autograd.grad([loss, tapped], leaves, [torch.ones(()), residual])
        else:
            loss = fused_pre_loss(hidden, anchor, weights, biases, backend="torch", **options)
            torch.autograd.grad(loss, leaves)
    return operators.names


@pytest.mark.parametrize("tap", (False, True))
def test_one_chunk_takes_no_views(tap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows; further chunks take one each of the index, losses, coefficients and buffers."""
    one, two, four = (count(tap, chunks, monkeypatch) for chunks in (1, 2, 4))
    assert one["aten::slice"] == 0 and not any("prereg" in name for name in one)
    assert four["aten::slice"] == 2 * two["aten::slice"] > 0
    # Buffers are allocated once, but for a chunk's sums of each bias
    assert two["aten::new_empty"] == one["aten::new_empty"] > 4
    assert two["aten::empty_like"] == one["aten::empty_like"] + 2 > 4
    assert one["aten::new_zeros"] == tap  # its scalar
    assert one["aten::mm"] + one["aten::addmm"] == 6


def test_the_coefficient_of_a_mean_is_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    names = count(True, 1, monkeypatch)
    assert names["aten::new_full"] == 1 and not names["aten::new_ones"]
