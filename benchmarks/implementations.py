"""What the benchmark compares: each a function that does one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.liger import liger_scheme
from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap
from prereg_kernels.ops.dtypes import operand_dtype


@dataclass(frozen=True)
class Size:
    """N visual tokens and D = M = A features."""

    tokens: int
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"N={self.tokens} D={self.width} {str(self.dtype).removeprefix('torch.')}"


# What makes each loss; it may compile with the first call
LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "eager": lambda: eager_pre_loss,
    "compiled eager": lambda: torch.compile(eager_pre_loss, fullgraph=True),
    "Liger's scheme": liger_scheme,
    "fused": lambda: fused_pre_loss,
    "fused, recompute": lambda: partial(fused_pre_loss, recompute=True),
    "tap": lambda: lambda *arguments: pre_tap(*arguments)[1],
}
NAMES = ("floor", *LOSSES)
Step = Callable[[], None]


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU only emulates products of this dtype, which takes up to 500 times longer."""
    return operand_dtype(dtype, torch.device("cpu")) != dtype


def make_tensors(size: Size) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(hidden, anchor, weights, biases) of the paper's head; all but the anchor require grad."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(size.dtype)

    n, d = size.tokens, size.width
    hidden, anchor = draw(n, d).requires_grad_(), draw(n, d)
    weights = [(draw(d, d) / d**0.5).requires_grad_() for _ in range(2)]
    biases = [draw(d).requires_grad_() for _ in range(2)]
    return hidden, anchor, weights, biases


def make_step(name: str, size: Size) -> Step:
    """The step of one implementation; its first call compiles where there is something to."""
    hidden, anchor, weights, biases = make_tensors(size)
    if name == "floor":
        return _floor(size, hidden, anchor, *weights)
    loss, leaves = LOSSES[name](), [hidden, *weights, *biases]

    def step() -> None:
        loss(hidden, anchor, weights, biases).backward()
        for leaf in leaves:
            leaf.grad = None

    return step


def _floor(size: Size, *tensors: Tensor) -> Step:
    """The six matmuls alone, in the dtype that this CPU is fast in.

    h and t stand for the activations of their shapes.
    """
    dtype = operand_dtype(size.dtype, torch.device("cpu"))
    h, t, w1, w2 = (x.detach().to(dtype) for x in tensors)

    def step() -> None:
        _ = h @ w1.T  # u
        _ = h @ w2.T  # z
        _ = t.T @ h  # dW2
        _ = t @ w2  # dg
        _ = t.T @ h  # dW1
        _ = t @ w1  # dh

    return step
