"""What the benchmark compares: each a function that does one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap
from prereg_kernels.heuristics import operand_dtype


@dataclass(frozen=True)
class Size:
    """N visual tokens and D = M = A features."""

    tokens: int
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"N={self.tokens} D={self.width} {str(self.dtype).removeprefix('torch.')}"


NAMES = ("floor", "eager", "compiled eager", "Liger's scheme", "fused", "fused, recompute", "tap")
LIGER_ROWS = 1024
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
    leaves = [hidden, *weights, *biases]

    if name == "floor":
        return _floor(size, hidden, anchor, *weights)
    if name == "Liger's scheme":
        return _liger(hidden, anchor, weights, biases)

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


def _liger(hidden: Tensor, anchor: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Step:
    """The scheme of Liger's fused linear losses: in forward, autograd over compiled chunks."""
    parameters = [*weights, *biases]

    def loss_of(h: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        return eager_pre_loss(h, t, parameters[:2], parameters[2:], denominator=len(hidden))

    differentiate = torch.compile(
        torch.func.grad_and_value(loss_of, argnums=(0, *range(2, 2 + len(parameters))))
    )

    def step() -> None:
        dh = torch.empty_like(hidden)
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in parameters]
        total = torch.zeros(())
        for start in range(0, len(hidden), LIGER_ROWS):
            rows = slice(start, start + LIGER_ROWS)
            gradients, loss = differentiate(hidden[rows].detach(), anchor[rows], *parameters)
            dh[rows] = gradients[0]
            for into, gradient in zip(sums, gradients[1:], strict=True):
                into += gradient
            total += loss
        _ = [into.to(x.dtype) for into, x in zip(sums, parameters, strict=True)]

    return step
