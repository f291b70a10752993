# SPDX-License-Identifier: Apache-2.0
"""What is timed: a peer's forward and backward pass, and the matmuls alone."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss.cases import Case, Tensors
from benchmarks.loss.peers import Loss, Peer
from prereg_kernels.ops.dtypes import operand_dtype


class Floor:
    """The matmuls alone, through torch, into buffers that exist: three a layer, or the first.

    The operands are what the real ones would be, up to rounding: power, and so the clock, depends
    on the values that flow.

    Args:
        fresh: give every result memory of its own, as a CPU's allocator does for the losses.
    """

    def __init__(
        self, case: Case, tensors: Tensors, activation: Loss = F.gelu, fresh: bool = False
    ) -> None:
        self.last: Tensor | None = None  # there until the next is, so that that one is elsewhere
        with torch.no_grad():
            x = tensors.hidden[: case.tokens].detach().to(case.dtype)
            self.weights = [w.detach().to(case.dtype) for w in tensors.weights]
            self.inputs: list[Tensor] = []
            self.outputs: list[Tensor | None] = []
            for layer, weight in enumerate(self.weights):
                self.inputs.append(activation(x) if layer else x)
                x = F.linear(self.inputs[-1], weight)
                self.outputs.append(x)
            d = tensors.anchor[: case.tokens].to(case.dtype, copy=True)  # stands for dz
            self.output_gradients: list[Tensor] = []
            self.input_gradients: list[Tensor | None] = []
            for weight in self.weights[::-1]:
                self.output_gradients.insert(0, d)
                d = d @ weight
                self.input_gradients.insert(0, d)
            self.weight_gradients: list[Tensor | None] = [
                torch.empty_like(w, dtype=case.weight_dtype) for w in tensors.weights
            ]
        # CPUs have no products with operands and result of different dtypes
        mixed = case.weight_dtype != case.dtype and x.device.type == "cuda"
        self.options = {"out_dtype": case.weight_dtype} if mixed else {}
        if fresh:
            nowhere: list[Tensor | None] = [None] * len(self.weights)
            self.outputs = self.weight_gradients = self.input_gradients = nowhere
        elif case.weight_dtype != case.dtype and not mixed:
            self.weight_gradients = [torch.empty_like(w) for w in self.weights]

    def forward(self) -> None:
        """One matmul a layer: x W^T."""
        for x, weight, out in zip(self.inputs, self.weights, self.outputs, strict=True):
            self.last = torch.mm(x, weight.T, out=out)

    def step(self) -> None:
        """Three matmuls a layer: x W^T, d^T x and d W."""
        self.forward()
        for layer in range(len(self.weights) - 1, -1, -1):
            d, x = self.output_gradients[layer], self.inputs[layer]
            self.last = torch.mm(d.T, x, out=self.weight_gradients[layer], **self.options)
            self.last = torch.mm(d, self.weights[layer], out=self.input_gradients[layer])


def floor_of(case: Case, tensors: Tensors) -> Floor:
    """The floor on the tensors' device: on a CPU in the dtype that it is fast in."""
    device = tensors.hidden.device
    if device.type != "cpu":
        return Floor(case, tensors)
    dtype = operand_dtype(case.dtype, device)
    return Floor(replace(case, dtype=dtype, weight_dtype=dtype), tensors, fresh=True)


class Work:
    """A peer on a case: its forward and backward pass, and their results.

    A peer with a residual gets a gradient of the hidden states from later layers, as in a network.
    It is as large as the gradient of the loss.
    """

    def __init__(self, peer: Peer, tensors: Tensors) -> None:
        self.peer, self.tensors = peer, tensors
        self.loss = peer.loss()
        self.leaves = list(tensors.leaves().values())
        self.upstream: list[Tensor | None] = [None]
        if peer.residual:
            hidden = tensors.hidden.detach()
            self.upstream.append(torch.empty_like(hidden).normal_(std=1 / hidden.numel()))

    def forward(self) -> tuple[Tensor, ...]:
        """The loss; of a peer with a residual also the hidden states that it passes on."""
        with torch.set_grad_enabled(self.peer.grad):
            found = self.loss(*self.tensors.arguments(), visual_index=self.tensors.visual_index)
        return found[::-1] if self.peer.residual else (found,)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients; not by `.backward()`, which would copy some of them into `.grad`."""
        if not self.peer.grad:
            return ()
        return torch.autograd.grad(outputs, self.leaves, self.upstream)

    def step(self) -> None:
        self.backward(self.forward())

    def results(self) -> dict[str, Tensor]:
        """The loss after backward, since the tap's is there only then, and its gradients."""
        outputs = self.forward()
        gradients = self.backward(outputs)
        named = {"loss": outputs[0].detach()}
        names = self.tensors.leaves() if gradients else ()
        named |= {f"d{name}": g for name, g in zip(names, gradients, strict=True)}
        if self.peer.residual:
            named["dhidden"] = named["dhidden"].double() - self.upstream[1]
        return named
