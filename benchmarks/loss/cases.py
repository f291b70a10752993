# SPDX-License-Identifier: Apache-2.0
"""The problems of the benchmarks: sizes, dtypes, and random tensors on the device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.ops.dtypes import operand_dtype


@dataclass(frozen=True)
class Case:
    """N visual tokens among more positions, and a head from widths[0] = D to widths[-1] = A."""

    name: str
    tokens: int
    widths: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16  # of hidden and anchor, and so of the matmuls
    weight_dtype: torch.dtype = torch.bfloat16
    text: bool = True  # or every position is a visual token, and there is no index

    @property
    def positions(self) -> int:
        """T: one text token for every nine visual ones."""
        return max(self.tokens + 1, self.tokens * 10 // 9) if self.text else self.tokens

    @property
    def matmul_flops(self) -> int:
        """Of the floor: three matmuls a layer, 2 N in out each."""
        return 6 * self.tokens * sum(i * o for i, o in itertools.pairwise(self.widths))

    @property
    def gradient_bytes(self) -> int:
        """dh (T, D), and dW and db of every layer: what a step returns."""
        parameters = sum((i + 1) * o for i, o in itertools.pairwise(self.widths))
        hidden = self.positions * self.widths[0]
        return hidden * self.dtype.itemsize + parameters * self.weight_dtype.itemsize

    def describe(self) -> dict[str, Any]:
        """The plain values, for JSON."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "positions": self.positions,
            "widths": list(self.widths),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "matmul_flops": self.matmul_flops,
        }


LLAVA = Case("LLaVA", 18_432, (4096, 4096, 4096))
QWEN = Case("Qwen2.5", 18_432, (3584, 3584, 3584))
LLAVA_AUTOTUNED = replace(LLAVA, name="LLaVA, autotuned")
SMALL_HEAD = Case("small head", 18_432, (4096, 1024, 4096))
LINEAR_HEAD = Case("linear head", 18_432, (4096, 4096))
MASTER_WEIGHTS = replace(LLAVA, name="fp32 weights", weight_dtype=torch.float32)
SWEEP_TOKENS = (1024, 4096, 16_384, 65_536, 262_144)
SWEEP = tuple(replace(LLAVA, name=f"N={n // 1024}k", tokens=n) for n in SWEEP_TOKENS)


def tiny(case: Case) -> Case:
    """The same problem at a size that a CPU runs in no time."""
    widths = tuple(max(16, width // 128) for width in case.widths)
    return replace(case, tokens=max(16, case.tokens // 128), widths=widths)


class Tensors(NamedTuple):
    """A case's tensors; all floating ones but the anchor require grad."""

    hidden: Tensor  # (T, D)
    anchor: Tensor  # (T, A)
    weights: list[Tensor]
    biases: list[Tensor]
    visual_index: Tensor | None  # (N,) sorted, of the visual tokens; None: all positions

    def leaves(self) -> dict[str, Tensor]:
        """By the names of their gradients."""
        named = {"hidden": self.hidden}
        named |= {f"W{layer}": weight for layer, weight in enumerate(self.weights)}
        return named | {f"b{layer}": bias for layer, bias in enumerate(self.biases)}

    def arguments(self) -> tuple[Any, ...]:
        return self.hidden, self.anchor, self.weights, self.biases


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Random tensors drawn on the device; the text tokens lie between runs of visual ones.

    The anchor is the head's prediction plus as much noise, so that the loss is near -0.7: there
    neither it nor its gradient is a small difference of large numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale)

    positions, index = case.positions, None
    if case.text:
        # as many text tokens as are left over, in front of equally long images
        image = max(1, -(-case.tokens // (positions - case.tokens)))
        index = torch.arange(case.tokens, device=device)
        index += index // image + 1
    weights = [
        draw(o, i, dtype=case.weight_dtype, scale=i**-0.5)
        for i, o in itertools.pairwise(case.widths)
    ]
    biases = [draw(o, dtype=case.weight_dtype, scale=0.1) for o in case.widths[1:]]
    hidden = draw(positions, case.widths[0], dtype=case.dtype)
    fast = operand_dtype(case.dtype, device)
    anchor = hidden.to(fast)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        anchor = F.gelu(anchor) if layer else anchor
        anchor = F.linear(anchor, weight.to(fast), bias.to(fast))
    anchor = anchor.to(case.dtype)
    size = anchor[: min(positions, 1024)].float().square().mean().sqrt()
    anchor = draw(*anchor.shape, dtype=case.dtype).mul_(size).add_(anchor)
    return Tensors(
        hidden.requires_grad_(),
        anchor,
        [weight.requires_grad_() for weight in weights],
        [bias.requires_grad_() for bias in biases],
        index,
    )
