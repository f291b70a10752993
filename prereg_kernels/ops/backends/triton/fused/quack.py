# SPDX-License-Identifier: Apache-2.0
"""Two stages as fused matmuls of quack-kernels, where it is installed and PREREG_FUSED=quack.

The first product of a head with bias and gelu, its pre-activation stored; and the product of the
backward pass with gelu's derivative, the bias's gradient summed up in its epilogue. On NVIDIA's
Hopper and data-centre Blackwells, in 16 bits. The rest is Triton's.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import Backend
from prereg_kernels.ops.backends.triton.backend import TritonBackend
from prereg_kernels.ops.backends.triton.fused.stages import describable
from prereg_kernels.ops.gpus import nvidia_capability

# By erf, as our gelu is. Its others approximate tanh by an instruction, which costs accuracy.
ACTIVATIONS = {"gelu": "gelu_erf"}
GENERATIONS = (9, 10)
# Its tuner would time its configurations in the middle of a step, and wait for the device
UNTUNED = {"tuned": False, "dynamic_scheduler": False}


class Quack(NamedTuple):
    """What is called of it; tests/ops/backends/quack_signatures.py has their signatures."""

    gemm_act: Any
    gemm_dact: Any
    dact_dbias_mod: Any


@cache
def find_quack() -> Quack | None:
    """None where it cannot be imported, with one warning."""
    try:
        from quack.epilogue.library import dact_dbias_mod
        from quack.gemm_interface import gemm_act, gemm_dact
    except ImportError as error:
        warnings.warn(
            f"PREREG_FUSED=quack: no stage is fused, as quack-kernels cannot be imported: {error}",
            stacklevel=2,
        )
        return None
    return Quack(gemm_act, gemm_dact, dact_dbias_mod)


class QuackStages(Backend):
    """Overrides the two stages; put it before a backend among the bases of a class."""

    def linear_activate(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, u: Tensor, g: Tensor
    ) -> None:
        quack = _choose(activation, x, weight, u, g)
        if quack is None:
            return super().linear_activate(x, weight, bias, activation, u, g)
        keeps_u = u is not g
        quack.gemm_act(
            x, weight.T, bias=bias, activation=ACTIVATIONS[activation],
            preact_out=u if keeps_u else None, postact_out=g, store_preact=keeps_u, **UNTUNED,
        )  # fmt: skip

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
        quack = _choose(activation, d, weight, u, du)
        if quack is None:
            return super().linear_backward_activation(d, weight, u, bias, activation, du, sums)
        name = ACTIVATIONS[activation]
        if sums is None:
            quack.gemm_dact(d, weight, u, activation=name, dx_out=du, **UNTUNED)
        else:
            results = quack.dact_dbias_mod(name)(d, weight, u, out={"D": du}, **UNTUNED)
            sums.copy_(results["dwb"].view_as(sums))


class QuackBackend(QuackStages, TritonBackend):
    """The Triton backend, two of its stages by quack-kernels."""


def _choose(activation: str, x: Tensor, *others: Tensor) -> Quack | None:
    """Quack, if it takes the product."""
    if activation not in ACTIVATIONS or not _is_new_enough(x.device):
        return None
    if not all(describable(tensor, x.dtype) for tensor in (x, *others)):
        return None
    return find_quack()


@cache
def _is_new_enough(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    capability = nvidia_capability(device)
    return capability is not None and capability[0] in GENERATIONS
