# SPDX-License-Identifier: Apache-2.0
"""The stages of the algorithm as fused matmuls in Triton, where the plan and the tensors allow."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.backends.triton.backend import TritonBackend
from prereg_kernels.ops.backends.triton.fused.matmul_config import (
    EVERYTHING,
    FusionPlan,
    MatmulConfig,
    choose_config,
)
from prereg_kernels.ops.gpus import nvidia_capability
from prereg_kernels.ops.spec import Spec

INTERPRETED_GPU = ((9, 0), 4)  # what the interpreter stands for
DTYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 16  # bytes, of a descriptor's base and rows


class FusedStages(Backend):
    """Overrides the stages that can be fused; put it before a backend among the bases of a class.

    What is not fused, by the plan, the GPU or the tensors, is the backend's. Fused stages have
    16-bit operands, and as in the backend's stages the bias is in u: the two mix.
    """

    def __init__(self, plan: FusionPlan = EVERYTHING, config: MatmulConfig | None = None) -> None:
        """config: of every fused matmul; None: the heuristic's."""
        self.plan, self.config = plan, config

    def linear_activate(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, u: Tensor, g: Tensor
    ) -> None:
        config = self._choose("activate", x, weight, g, u)
        if config is None:
            return super().linear_activate(x, weight, bias, activation, u, g)
        from prereg_kernels.ops.backends.triton.fused.matmul_launch import linear_activate

        linear_activate(x, weight, bias, activation, u, g, config, _gpu(x.device)[1])

    def linear_losses(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, chunk: LossChunk, spec: Spec
    ) -> None:
        # The gradient, l2 and layer need the row's statistics before anything else
        simple = spec.loss == "cosine" or spec.normalize == "none"
        config = None
        if chunk.dz is None and simple and _rows_of(chunk.anchor, chunk.anchor_index):
            config = self._choose("losses", x, weight, chunk.z)
        if config is None:
            return super().linear_losses(x, weight, bias, chunk, spec)
        from prereg_kernels.ops.backends.triton.fused.matmul_launch import linear_losses

        linear_losses(x, weight, bias, chunk, spec, config, _gpu(x.device)[1])

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
        config = self._choose("backward_activation", d, weight, du, u)
        if config is None:
            return super().linear_backward_activation(d, weight, u, bias, activation, du, sums)
        from prereg_kernels.ops.backends.triton.fused.matmul_launch import (
            linear_backward_activation,
        )

        sms = _gpu(d.device)[1]
        linear_backward_activation(d, weight, u, activation, du, sums, config, sms)

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
        config = None
        both = into if residual is None else residual
        if scratch is not None and _rows_of(into, index) and _rows_of(both, index):
            # else a plain matmul does it all
            config = self._choose("backward_scatter", d, weight, scratch)
        if config is None:
            return super().linear_backward_scatter(d, weight, into, index, scale, residual, scratch)
        from prereg_kernels.ops.backends.triton.fused.matmul_launch import linear_backward_scatter

        sms = _gpu(d.device)[1]
        linear_backward_scatter(d, weight, into, index, scale, residual, config, sms)

    def _choose(
        self, stage: str, x: Tensor, weight: Tensor, product: Tensor, *others: Tensor
    ) -> MatmulConfig | None:
        """The configuration for product (M, N) = x (M, K) and the weight; None: not fused."""
        capability, multiprocessors = _gpu(x.device)
        described = (x, weight, product, *others)
        if not getattr(self.plan, stage) or not all(describable(y, x.dtype) for y in described):
            return None
        rows, columns = product.shape
        config = choose_config(stage, rows, columns, x.itemsize, capability, multiprocessors)
        return self.config if config is not None and self.config is not None else config


class FusedTritonBackend(FusedStages, TritonBackend):
    """The Triton backend, its stages fused."""


def describable(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor descriptor can stand for the matrix, in this dtype."""
    return (
        x.dtype == dtype
        and dtype in DTYPES
        and x.numel() > 0
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and (x.stride(0) * x.itemsize) % ALIGNMENT == 0
        and x.data_ptr() % ALIGNMENT == 0
    )


def _rows_of(x: Tensor, index: Tensor | None) -> bool:
    """Whether an epilogue can address the rows of x, in float32."""
    return x.dtype != torch.float64 and x.stride(1) == 1 and (index is None or index.stride(0) == 1)


@cache
def _gpu(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Compute capability, None for other makers' GPUs, and multiprocessors."""
    if device.type == "cpu":
        return INTERPRETED_GPU
    properties = torch.cuda.get_device_properties(device)
    return nvidia_capability(device), properties.multi_processor_count
