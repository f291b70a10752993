"""What the benchmark compares: each a function that does one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap


@dataclass(frozen=True)
class Size:
    """N visual tokens and D = M = A features."""

    tokens: int
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"N={self.tokens} D={self.width} {str(self.dtype).removeprefix('torch.')}"


SIZES = tuple(
    Size(tokens, width, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, width in ((2048, 512), (4096, 1024))
)
NAMES = ("floor", "eager", "compiled eager", "fused", "fused, recompute", "tap")
Step = Callable[[], None]


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
    leaves = [hidden, *weights, *biases]

    if name == "floor":
        return _floor(hidden.detach(), anchor, weights[0].detach(), weights[1].detach())

    def loss_of() -> Tensor:
        arguments = (hidden, anchor, weights, biases)
        if name == "eager":
            return eager_pre_loss(*arguments)
        if name == "compiled eager":
            return compiled(*arguments)
        if name == "tap":
            return pre_tap(*arguments)[1]
        return fused_pre_loss(*arguments, recompute=name == "fused, recompute")

    compiled = torch.compile(eager_pre_loss, fullgraph=True) if name == "compiled eager" else None

    def step() -> None:
        loss_of().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


def _floor(h: Tensor, t: Tensor, w1: Tensor, w2: Tensor) -> Step:
    """The six matmuls alone; h and t stand for the activations of their shapes."""

    def step() -> None:
        _ = h @ w1.T  # u
        _ = h @ w2.T  # z
        _ = t.T @ h  # dW2
        _ = t @ w2  # dg
        _ = t.T @ h  # dW1
        _ = t @ w1  # dh

    return step
