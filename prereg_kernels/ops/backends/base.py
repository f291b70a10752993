# SPDX-License-Identifier: Apache-2.0
"""What a backend has to provide: the row primitives, and the stages of the algorithm.

The tensors are named as in the paper: h (n, D) hidden states, u and g (n, M) pre-activation and
activation, z and t (n, A) prediction and target, for a chunk of n rows; index (n,) says where its
rows are, None that they are all there is, in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.ops.products import add_product, wide_products
from prereg_kernels.ops.spec import Spec


class LossChunk(NamedTuple):
    """The prediction and the target of a chunk, and where its losses and their gradient go."""

    z: Tensor  # (n, A); without its bias, if `bias` has it
    bias: Tensor | None  # (A,)
    anchor: Tensor  # (any, A), any strides
    anchor_index: Tensor | None  # (n,) the anchor's rows; None: all, in order
    losses: Tensor  # (n,), written
    # With a gradient; None: losses alone
    coefficient: Tensor | None = None  # (n,)
    dz: Tensor | None = None  # (n, A), written: coefficient * dloss/dz; may be z
    sums: Tensor | None = None  # (A,), written: the column sums of dz


class Backend(ABC):
    """A backend: six primitives, and stages of a matmul and a primitive, which it may fuse.

    Elementwise work is done in float32 (float64 for float64). A bias is added by the primitive
    that reads the matmul's result; in 16 bits by the matmul itself, as in eager PyTorch, so that
    their sum is rounded once: an error above eager's would show in the gradients. Biases, z and
    dz, u, g and dg have rows of unit stride. Column sums are summed in the dtype of `sums`, in a
    fixed order.
    """

    name: str

    @staticmethod
    def unavailable(device: torch.device | str) -> str | None:
        """Why it does not run on this device here, in one line; None if it does."""
        return None

    @staticmethod
    def note_absence(device: torch.device, reason: str) -> None:
        """Called once where "auto" would have taken it, and it does not run: a place to warn."""
        return None

    @staticmethod
    def on_request_only(device_type: str) -> bool:
        """Whether "auto" passes it over on such devices though it runs."""
        return False

    def refuses(self, spec: Spec) -> str | None:
        """What of this call it does not take, as "loss='huber'"; None if it takes all of it."""
        return None

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
        """du = dg * act'(u + bias), written over dg; sums (M,) = its column sums."""

    @abstractmethod
    def token_losses(self, chunk: LossChunk, spec: Spec) -> None:
        """The losses of z + bias and t = anchor[index], and with `dz` their gradient."""

    @abstractmethod
    def start_rows(self, into: Tensor, index: Tensor, residual: Tensor | None) -> Tensor | None:
        """into = residual, or 0, but for the rows of the index, which `scatter_rows` writes.

        Returns what it has to add there: the residual, or `into` where these rows are copied, too.
        into (T, C), contiguous; residual (T, C), of its dtype, any strides.
        """

    @abstractmethod
    def scatter_rows(
        self,
        values: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
    ) -> None:
        """into[index] = values * scale + residual[index], rounded once; indices are unique.

        residual: of the shape and dtype of `into`, any strides; or `into` itself.
        """

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = x W^T, plus the bias unless `bias_left` says otherwise."""
        if bias is not None and self.bias_left(bias, x.dtype) is None:
            torch.addmm(bias, x, weight.t(), out=out)
        else:
            torch.mm(x, weight.t(), out=out)

    def linear_activate(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, u: Tensor, g: Tensor
    ) -> None:
        """u = x W^T with the bias or without, g = act(x W^T + bias); u may be g.

        u is for `linear_backward_activation`.
        """
        self.linear(x, weight, bias, u)
        self.activate(u, self.bias_left(bias, x.dtype), activation, g)

    def linear_losses(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, chunk: LossChunk, spec: Spec
    ) -> None:
        """`token_losses` of z = x W^T + bias; the chunk's z is scratch, and has no bias yet."""
        self.linear(x, weight, bias, chunk.z)
        self.token_losses(chunk._replace(bias=self.bias_left(bias, x.dtype)), spec)

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
        """du = (d W) * act'(...) for the u of `linear_activate`; sums = its column sums."""
        torch.mm(d, weight, out=du)
        self.activation_backward(du, u, self.bias_left(bias, d.dtype), activation, sums)

    def linear_backward_scatter(
        self,
        d: Tensor,
        weight: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        scratch: Tensor | None,
    ) -> None:
        """`scatter_rows` of d W. Without scratch (n, D) no index or scale, one dtype."""
        if scratch is not None:
            torch.mm(d, weight, out=scratch)
            self.scatter_rows(scratch, into, index, scale, residual)
        elif residual is not None:
            torch.addmm(residual, d, weight, out=into)
        else:
            torch.mm(d, weight, out=into)

    def add_product(
        self, total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype | None
    ) -> Tensor:
        """total + a b, the sum of a weight gradient over chunks: see `products.add_product`."""
        return add_product(total, a, b, wide)

    def has_wide_products(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `add_product` sums products of 16-bit operands in float32 without a copy."""
        return wide_products(device, dtype).product

    def bias_left(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The bias that `linear`, with operands of this dtype, leaves to the next primitive."""
        return None if dtype.itemsize == 2 else bias
