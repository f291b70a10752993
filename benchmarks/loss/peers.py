"""What the GPU benchmark compares: the loss by each implementation, and the matmuls alone.

Every loss takes `(hidden, anchor, weights, biases, visual_index=...)` and returns a scalar. None
of the peers is held back: they gather rows as fast as torch can, in the same dtypes as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss.cases import Case, Tensors
from benchmarks.loss.liger import liger_package_loss, liger_scheme
from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap

Loss = Callable[..., Tensor]
LONGEST_COMPILATION = 50.0  # seconds
LONGEST_AUTOTUNING = 90.0


@dataclass(frozen=True)
class Variant:
    """An implementation. `make` gives its loss; the first call of that may compile."""

    name: str
    make: Callable[[], Loss]
    ours: bool = False
    grad: bool = True  # or the value alone, under no_grad
    seconds: float = 30.0  # allowed to the first call


def tap_loss(*arguments: Any, **options: Any) -> Tensor:
    """The tap's scalar: backward through it computes everything."""
    return pre_tap(*arguments, **options)[1]


def eager_index_select(
    hidden: Tensor,
    anchor: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    visual_index: Tensor,
) -> Tensor:
    """Eager, with rows taken by index_select: its backward is faster than that of `hidden[index]`,
    which sorts the indices, as they might repeat.
    """
    h, t = hidden.index_select(0, visual_index), anchor.index_select(0, visual_index)
    return eager_pre_loss(h, t, weights, biases)


def compiled(loss: Loss, **options: Any) -> Loss:
    """By torch.compile for exactly these shapes."""
    return torch.compile(loss, fullgraph=True, dynamic=False, **options)


def our_variants(backend: str) -> list[Variant]:
    """The package's implementations, on `backend`, and the fused loss on plain PyTorch rows."""

    def ours(
        name: str, loss: Loss, backend: str = backend, grad: bool = True, **options: Any
    ) -> Variant:
        return Variant(name, lambda: partial(loss, backend=backend, **options), True, grad)

    return [
        ours("fused", fused_pre_loss),
        ours("tap", tap_loss),
        ours("fused, recompute", fused_pre_loss, recompute=True),
        ours("fused, torch rows", fused_pre_loss, backend="torch"),
        ours("forward", fused_pre_loss, grad=False),
    ]


EAGER = [
    Variant("eager", lambda: eager_pre_loss),
    Variant("eager, index_select", lambda: eager_index_select),
    Variant("forward, eager", lambda: eager_index_select, grad=False),
]
COMPILED = [
    Variant("compile", lambda: compiled(eager_pre_loss), seconds=LONGEST_COMPILATION),
    Variant("Liger's scheme", liger_scheme, seconds=LONGEST_COMPILATION),
]
AUTOTUNED = [
    Variant(
        "compile, max-autotune",
        lambda: compiled(eager_pre_loss, mode="max-autotune-no-cudagraphs"),
        seconds=LONGEST_AUTOTUNING,
    )
]
LIGER_PACKAGE = [Variant("liger_kernel", liger_package_loss, seconds=LONGEST_COMPILATION)]


class Floor:
    """The matmuls alone, through torch, into buffers that exist: three a layer, or the first.

    The operands are what the real ones would be, up to rounding: power, and so the clock, depends
    on the values that flow.
    """

    def __init__(self, case: Case, tensors: Tensors, activation: Loss = F.gelu) -> None:
        with torch.no_grad():
            x = tensors.hidden[: case.tokens].detach()
            self.weights = [w.detach().to(case.dtype) for w in tensors.weights]
            self.inputs: list[Tensor] = []
            self.outputs: list[Tensor] = []
            for layer, weight in enumerate(self.weights):
                self.inputs.append(activation(x) if layer else x)
                x = F.linear(self.inputs[-1], weight)
                self.outputs.append(x)
            d = tensors.anchor[: case.tokens].clone()  # stands for dz
            self.output_gradients: list[Tensor] = []
            self.input_gradients: list[Tensor] = []
            for weight in self.weights[::-1]:
                self.output_gradients.insert(0, d)
                d = d @ weight
                self.input_gradients.insert(0, d)
            self.weight_gradients = [
                torch.empty_like(w, dtype=case.weight_dtype) for w in tensors.weights
            ]
        # CPUs have no products with operands and result of different dtypes
        mixed = case.weight_dtype != case.dtype and x.device.type == "cuda"
        self.options = {"out_dtype": case.weight_dtype} if mixed else {}
        if case.weight_dtype != case.dtype and not mixed:
            self.weight_gradients = [g.to(case.dtype) for g in self.weight_gradients]

    def forward(self) -> None:
        """One matmul a layer: x W^T."""
        for x, weight, out in zip(self.inputs, self.weights, self.outputs, strict=True):
            torch.mm(x, weight.T, out=out)

    def step(self) -> None:
        """Three matmuls a layer: x W^T, d^T x and d W."""
        self.forward()
        for layer in range(len(self.weights) - 1, -1, -1):
            d, x = self.output_gradients[layer], self.inputs[layer]
            torch.mm(d.T, x, out=self.weight_gradients[layer], **self.options)
            torch.mm(d, self.weights[layer], out=self.input_gradients[layer])


class Work:
    """One variant on one case: its forward and backward pass, and their results."""

    def __init__(self, variant: Variant, tensors: Tensors) -> None:
        self.variant, self.tensors = variant, tensors
        self.loss = variant.make()
        self.leaves = list(tensors.leaves().values())

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.variant.grad):
            return self.loss(*self.tensors.arguments(), visual_index=self.tensors.visual_index)

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        """The gradients; not by `.backward()`, which would copy some of them into `.grad`."""
        return torch.autograd.grad(loss, self.leaves) if self.variant.grad else ()

    def step(self) -> None:
        self.backward(self.forward())

    def results(self) -> dict[str, Tensor]:
        """The loss after backward, since the tap's is there only then, and the gradients."""
        loss = self.forward()
        gradients = self.backward(loss)
        named = {"loss": loss.detach()}
        names = self.tensors.leaves() if gradients else ()
        return named | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}
