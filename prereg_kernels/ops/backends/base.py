"""What a backend of the row primitives has to provide, and the stages of the algorithm.

The tensors are named as in the paper: h (n, D) hidden states, u and g (n, M) pre-activation and
activation, z and t (n, A) prediction and target, for a chunk of n rows; index (n,) says where its
rows are, None that they are all there is, in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from prereg_kernels.ops.arguments import Spec
from prereg_kernels.ops.products import add_product, has_wide_products


class Rows(ABC):
    """A backend: six primitives, and stages of a matmul and a primitive, which it may fuse.

    Elementwise work is done in float32 (float64 for float64). A bias is added by the primitive
    that reads the matmul's result; in 16 bits by the matmul itself, as in eager PyTorch, so that
    their sum is rounded once: an error above eager's would show in the gradients. Biases, z and
    dz, u, g and dg have rows of unit stride. Column sums are summed in the dtype of `sums`, in a
    fixed order.
    """

    name: str

    @abstractmethod
    def gather_rows(self, source: Tensor, index: Tensor | None, out: Tensor) -> None:
        """out = source[index], in the dtype of `out`; the source may have any strides."""

    @abstractmethod
    def activate(self, u: Tensor, bias: Tensor | None, activation: str, g: Tensor) -> None:
        """g = act(u + bias); g may be u."""

    @abstractmethod
    def activation_backward(
        self, dg: Tensor, u: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None
    ) -> None:
        """du = dg * act'(u + bias), written over dg; sums (M,) += its column sums."""

    @abstractmethod
    def token_losses(
        self,
        z: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        index: Tensor | None,
        spec: Spec,
        losses: Tensor,
    ) -> None:
        """losses (n,) of z + bias and t = anchor[index]; the anchor may have any strides."""

    @abstractmethod
    def token_losses_and_grad(
        self,
        z: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        index: Tensor | None,
        coefficient: Tensor,
        spec: Spec,
        losses: Tensor,
        dz: Tensor,
        sums: Tensor | None,
    ) -> None:
        """As `token_losses`; writes coefficient * dloss/dz to dz, which may be z.

        sums (A,) += the column sums of dz; coefficient (n,).
        """

    @abstractmethod
    def scatter_rows(
        self,
        values: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        accumulate: bool,
    ) -> None:
        """into[index] = values * scale, or += where `accumulate`; indices are unique."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = x W^T, plus the bias unless `bias_left` says otherwise."""
        if bias is not None and self.bias_left(bias, x.dtype) is None:
            torch.addmm(bias, x, weight.T, out=out)
        else:
            torch.mm(x, weight.T, out=out)

    def linear_activate(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, u: Tensor, g: Tensor
    ) -> None:
        """u = x W^T with the bias or without, g = act(x W^T + bias); u may be g.

        u is for `linear_backward_activation`.
        """
        self.linear(x, weight, bias, u)
        self.activate(u, self.bias_left(bias, x.dtype), activation, g)

    def linear_losses(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        index: Tensor | None,
        spec: Spec,
        z: Tensor,
        losses: Tensor,
    ) -> None:
        """losses of x W^T + bias; z (n, A) is scratch."""
        self.linear(x, weight, bias, z)
        self.token_losses(z, self.bias_left(bias, x.dtype), anchor, index, spec, losses)

    def linear_losses_and_grad(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        index: Tensor | None,
        coefficient: Tensor,
        spec: Spec,
        losses: Tensor,
        dz: Tensor,
        sums: Tensor | None,
    ) -> None:
        """losses and dz of z = x W^T + bias."""
        self.linear(x, weight, bias, dz)
        left = self.bias_left(bias, x.dtype)
        self.token_losses_and_grad(dz, left, anchor, index, coefficient, spec, losses, dz, sums)

    def linear_backward_activation(
        self,
        d: Tensor,
        weight: Tensor,
        u: Tensor,
        bias: Tensor | None,
        activation: str,
        du: Tensor,
        sums: Tensor | None,
    ) -> None:
        """du = (d W) * act'(...) for the u of `linear_activate`; sums += its column sums."""
        torch.mm(d, weight, out=du)
        self.activation_backward(du, u, self.bias_left(bias, d.dtype), activation, sums)

    def linear_backward_scatter(
        self,
        d: Tensor,
        weight: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        accumulate: bool,
        scratch: Tensor | None,
    ) -> None:
        """into[index] = scale * d W, or +=. Without scratch (n, D) no index or scale, one dtype."""
        if scratch is not None:
            torch.mm(d, weight, out=scratch)
            self.scatter_rows(scratch, into, index, scale, accumulate)
        elif accumulate:
            into.addmm_(d, weight)
        else:
            torch.mm(d, weight, out=into)

    def add_product(
        self, total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype | None
    ) -> Tensor:
        """total + a b, the sum of a weight gradient over chunks: see `products.add_product`."""
        return add_product(total, a, b, wide)

    def has_wide_products(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `add_product` sums products of 16-bit operands in float32 without a copy."""
        return has_wide_products(device)

    def bias_left(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The bias that `linear`, with operands of this dtype, leaves to the next primitive."""
        return None if dtype.itemsize == 2 else bias
