# SPDX-License-Identifier: Apache-2.0
"""The compiled row primitives (csrc/) for CPUs, in the variant for this CPU's instructions."""

from __future__ import annotations

import torch
from torch import Tensor

from prereg_kernels._util import private
from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.backends.cpp_libraries import find_libraries, load, warn_if_not_built
from prereg_kernels.ops.spec import Spec


def unavailable(device: torch.device | str) -> str | None:
    """Why the backend does not run on this device here, in one line; None if it does."""
    if torch.device(device).type != "cpu":
        return "it is for CPUs only"
    return find_libraries().reason


class CppBackend(Backend):
    """Args: variant: as `runnable_variants` names them; None: the fastest that this CPU can run.

    Raises:
        ValueError: it does not run here, and why.
    """

    name = "cpp"
    unavailable = staticmethod(unavailable)

    @staticmethod
    def note_absence(device: torch.device, reason: str) -> None:
        if device.type == "cpu":
            warn_if_not_built()

    def __init__(self, variant: str | None = None) -> None:
        libraries = find_libraries()
        if libraries.reason is not None:
            raise ValueError(f"the compiled row primitives: {libraries.reason}")
        self.variant = variant or libraries.variants[0]
        if self.variant not in libraries.variants:
            raise ValueError(
                f"variant: expected one of {', '.join(libraries.variants)}; got {variant!r}"
            )
        load(libraries.folder, self.variant)
        self._ops = getattr(torch.ops, f"prereg_rows_{self.variant}")
        self._losses, self._activations = self._ops.losses(), self._ops.activations()

    def refuses(self, spec: Spec) -> str | None:
        if spec.loss not in self._losses:
            return f"loss={spec.loss!r}"
        if spec.activation not in self._activations:
            return f"activation={spec.activation!r}"
        return None

    def gather_rows(self, source: Tensor, index: Tensor | None, out: Tensor) -> None:
        self._ops.gather_rows(source, index, out)

    def activate(self, u: Tensor, bias: Tensor | None, activation: str, g: Tensor) -> None:
        self._ops.activate(u, bias, activation, g)

    def activation_backward(
        self, dg: Tensor, u: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None
    ) -> None:
        self._ops.activation_backward(dg, u, bias, activation, sums)

    def token_losses(self, chunk: LossChunk, spec: Spec) -> None:
        z, bias, anchor, index, losses, coefficient, dz, sums = chunk
        formula = spec.loss, spec.normalize, spec.eps
        if dz is None:
            self._ops.token_losses(z, bias, anchor, index, *formula, losses)
        else:
            self._ops.token_losses_and_grad(
                z, bias, anchor, index, coefficient, *formula, losses, dz, sums
            )

    def start_rows(self, into: Tensor, index: Tensor, residual: Tensor | None) -> Tensor | None:
        if residual is not None and residual.stride(1) != 1:  # read along its columns just once
            return into.copy_(residual)
        self._ops.copy_others(into, index, residual)
        return residual

    def scatter_rows(
        self,
        values: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
    ) -> None:
        self._ops.scatter_rows(values, into, index, scale, residual)

    def add_product(
        self, total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype | None
    ) -> Tensor:
        if wide != torch.float32 or not self.has_wide_products(a.device, a.dtype):
            return super().add_product(total, a, b, wide)
        out = a.new_empty(a.shape[0], b.shape[1], dtype=wide) if total is None else total
        self._ops.wide_product(a.T, b, out, total is not None)
        return out

    def has_wide_products(self, device: torch.device, dtype: torch.dtype) -> bool:
        """MKL has such products of bfloat16. With tile registers they are fast.

        With AVX512_BF16 alone, on an AMD EPYC, they took as long as those of float32 copies.
        """
        return (
            private.has_amx_tiles()
            and dtype == torch.bfloat16
            and bool(self._ops.has_wide_product())
        )
