# SPDX-License-Identifier: Apache-2.0
"""The backends there are, and which one a call gets. `base.py` says what a backend is."""

from __future__ import annotations

import logging
import os
from functools import cache, lru_cache
from importlib import import_module
from typing import Literal

import torch

from prereg_kernels.ops.backends.base import Backend
from prereg_kernels.ops.spec import Spec, check_name

logger = logging.getLogger(__name__)

# Every backend, the fastest first: its module in this folder, imported when a call may need it, and
# its class. "auto" takes the first that runs on the device and takes the call.
BackendName = Literal["auto", "triton", "cpp", "torch"]
CLASSES = {
    "triton": ("triton.backend", "TritonBackend"),
    "cpp": ("cpp", "CppBackend"),
    "torch": ("torch", "TorchBackend"),
}
FASTEST_FIRST = tuple(CLASSES)
# In place of "triton", with fused matmuls, where PREREG_FUSED names one
FUSED = {
    "triton": ("triton.fused.stages", "FusedTritonBackend"),
    "quack": ("triton.fused.quack", "QuackBackend"),
}
BACKENDS = ("auto", *CLASSES)


def choose_backend(name: str, device: torch.device, spec: Spec | None = None) -> Backend:
    """The backend for calls like this one; `spec` None: for what depends on no formula.

    Raises:
        ValueError: an unknown backend, or one that does not run on `device` here or does not take
            the call, and why.
    """
    if device.index is None and device.type == "cuda":  # which may be another one next time
        device = torch.device("cuda", torch.cuda.current_device())
    return _choose(name, device, spec)


def unavailable(name: str, device: torch.device | str) -> str | None:
    """Why the backend does not run on this device here, in one line; None if it does."""
    return _class(name).unavailable(device)


@lru_cache(maxsize=1024)  # so that a call costs a look-up
def _choose(name: str, device: torch.device, spec: Spec | None) -> Backend:
    check_name("backend", name, BACKENDS)
    if name == "auto":
        return next(filter(None, (_accept(each, device, spec) for each in FASTEST_FIRST)))
    if reason := unavailable(name, device):
        raise ValueError(f"backend={name!r}: does not run on {device} here: {reason}")
    backend = _make(name)
    if refused := spec and backend.refuses(spec):
        raise ValueError(
            f"backend={name!r}: has no kernel for {refused}; expected backend='auto', which leaves "
            "that to plain PyTorch"
        )
    return backend


def _accept(name: str, device: torch.device, spec: Spec | None) -> Backend | None:
    """The backend, if "auto" may take it."""
    if _class(name).on_request_only(device.type):
        return None
    if reason := unavailable(name, device):
        _note_absence(name, device, reason)
        return None
    backend = _make(name)
    if refused := spec and backend.refuses(spec):
        _log(name, f"has no kernel for {refused}")
        return None
    return backend


@cache
def _note_absence(name: str, device: torch.device, reason: str) -> None:
    _log(name, f"does not run on {device} here: {reason}")
    _class(name).note_absence(device, reason)


@cache
def _log(name: str, reason: str) -> None:
    """Log once for each backend and reason."""
    logger.debug("backend %s is passed over: it %s", name, reason)


@cache
def _class(name: str) -> type[Backend]:
    module, member = CLASSES[name]
    if name == "triton" and (provider := os.environ.get("PREREG_FUSED")):
        check_name("PREREG_FUSED", provider, tuple(FUSED))
        module, member = FUSED[provider]
    found: type[Backend] = getattr(import_module(f"{__package__}.{module}"), member)
    return found


@cache
def _make(name: str) -> Backend:
    return _class(name)()
