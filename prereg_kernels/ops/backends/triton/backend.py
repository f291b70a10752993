# SPDX-License-Identifier: Apache-2.0
"""The row primitives in Triton, for NVIDIA and AMD GPUs."""

from __future__ import annotations

import os
import warnings
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.backends.triton.compiler import COMPILER, missing_compiler
from prereg_kernels.ops.gpus import nvidia_capability
from prereg_kernels.ops.spec import Spec

LOSSES = ("cosine", "mse", "smooth_l1", "l1")  # of loss_math.py
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")  # of activation.py
OLDEST = (3, 4)
OLDEST_CAPABILITY = (8, 0)
SMALL_COPY = 2**24  # bytes that take less time than the two launches which would spare a part


def unavailable(device: torch.device | str) -> str | None:
    """Why the backend does not run on this device here; None if it does.

    AMD's GPUs are "cuda" too. On the CPU kernels are interpreted, for tests.
    """
    device = torch.device(device)
    if device.type == "cpu" and not interpreting():
        return "Triton runs on a CPU only under TRITON_INTERPRET=1, which is slow and for tests"
    if device.type not in ("cpu", "cuda"):
        return "Triton kernels are for NVIDIA and AMD GPUs"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {str(error).splitlines()[0]}"
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"Triton {triton.__version__} is too old: {'.'.join(map(str, OLDEST))} is needed"
    if device.type == "cpu":
        return None
    capability = nvidia_capability(device)
    if capability is not None and capability < OLDEST_CAPABILITY:
        number = ".".join(map(str, capability))
        return f"GPU {device.index or 0} has compute capability {number}: 8.0 is needed"
    return missing_compiler()


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"PRe runs without its Triton kernels on this machine's GPUs, and is slower: {reason}",
        stacklevel=2,
    )


def interpreting() -> bool:
    """Whether Triton, when imported, takes itself to be an interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class TritonBackend(Backend):
    """A launch a primitive, or two with column sums; nothing here waits for the device.

    Indices out of range are asserted against on NVIDIA's GPUs, by the device, and are undefined on
    AMD's. Triton is imported with the first launch.
    """

    name = "triton"
    unavailable = staticmethod(unavailable)

    @staticmethod
    def note_absence(device: torch.device, reason: str) -> None:
        if COMPILER in reason:
            _warn_once(reason)

    @staticmethod
    def on_request_only(device_type: str) -> bool:
        return device_type == "cpu"  # where kernels are interpreted, for tests that ask for it

    def refuses(self, spec: Spec) -> str | None:
        if spec.loss not in LOSSES:
            return f"loss={spec.loss!r}"
        if spec.activation not in ACTIVATIONS:
            return f"activation={spec.activation!r}"
        return None

    @cached_property
    def _kernels(self) -> Any:
        from prereg_kernels.ops.backends.triton import primitives

        return primitives

    def gather_rows(self, source: Tensor, index: Tensor | None, out: Tensor) -> None:
        if out.numel():
            self._kernels.gather_rows(source, index, out)

    def activate(self, u: Tensor, bias: Tensor | None, activation: str, g: Tensor) -> None:
        if u.numel():
            self._kernels.activate(u, bias, activation, g)

    def activation_backward(
        self, dg: Tensor, u: Tensor, bias: Tensor | None, activation: str, sums: Tensor | None
    ) -> None:
        if dg.numel():
            self._kernels.activation_backward(dg, u, bias, activation, sums)
        elif sums is not None:
            sums.zero_()

    def token_losses(self, chunk: LossChunk, spec: Spec) -> None:
        if chunk.z.numel():
            self._kernels.token_losses(chunk, spec)
        elif chunk.sums is not None:
            chunk.sums.zero_()

    def start_rows(self, into: Tensor, index: Tensor, residual: Tensor | None) -> Tensor | None:
        if into.nbytes < SMALL_COPY:
            if residual is None:
                into.zero_()
                return None
            return into.copy_(residual)
        self._kernels.copy_others(into, index, residual)
        return residual

    def scatter_rows(
        self,
        values: Tensor,
        into: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
    ) -> None:
        if values.numel():
            self._kernels.scatter_rows(values, into, index, scale, residual)
