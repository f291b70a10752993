"""The choice of a backend for the row primitives. `base.py` says what a backend is."""

from __future__ import annotations

from functools import cache

import torch

from prereg_kernels.ops.arguments import check_name
from prereg_kernels.ops.backends.base import Rows
from prereg_kernels.ops.names import BACKENDS

FASTEST_FIRST = ("triton", "cpp", "torch")


def choose_rows(backend: str, device: torch.device) -> Rows:
    """The backend. "auto" takes the fastest one that runs on `device`.

    Raises:
        ValueError: an unknown backend, or one that does not run on `device` here, and why.
    """
    check_name("backend", backend, BACKENDS)
    return _choose(backend, device.type)


def unavailable(backend: str, device_type: str) -> str | None:
    """Why the backend does not run on such devices here, in one line; None if it does."""
    if backend == "cpp":
        from prereg_kernels.ops.backends import cpp

        return cpp.unavailable(device_type)
    if backend == "triton":
        from prereg_kernels.ops.backends.triton.backend import unavailable as unavailable_triton

        return unavailable_triton(device_type)
    return None


@cache
def _choose(backend: str, device_type: str) -> Rows:
    if backend == "auto":
        # Triton runs on a CPU when it is interpreted, which is for tests that ask for it
        names = [name for name in FASTEST_FIRST if name != "triton" or device_type != "cpu"]
        backend = next(name for name in names if unavailable(name, device_type) is None)
        if backend == "torch" and "cpp" in names and device_type == "cpu":
            from prereg_kernels.ops.backends.cpp_libraries import warn_if_not_built

            warn_if_not_built()
    elif reason := unavailable(backend, device_type):
        raise ValueError(f"backend={backend!r}: does not run on {device_type} here: {reason}")
    if backend == "cpp":
        from prereg_kernels.ops.backends.cpp import CppRows

        return CppRows()
    if backend == "triton":
        from prereg_kernels.ops.backends.triton.fused import FusedTritonRows

        return FusedTritonRows()
    from prereg_kernels.ops.backends.torch import TorchRows

    return TorchRows()
