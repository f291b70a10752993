# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend, and what is said where one does not run."""

from __future__ import annotations

import pytest
import torch

from prereg_kernels.ops.backends import cpp_libraries, registry
from prereg_kernels.ops.backends.base import Backend
from prereg_kernels.ops.backends.cpp import CppBackend
from prereg_kernels.ops.backends.registry import FASTEST_FIRST, choose_backend, unavailable
from prereg_kernels.ops.backends.triton.backend import TritonBackend
from prereg_kernels.ops.losses import LOSSES
from prereg_kernels.ops.spec import Spec
from tests.helpers import KERNEL_ACTIVATIONS, KERNEL_LOSSES, LOSS_NAMES, forget_backends

CPU = torch.device("cpu")


def test_auto_is_the_first_that_runs() -> None:
    running = [name for name in FASTEST_FIRST if unavailable(name, "cpu") is None]
    assert choose_backend("auto", CPU).name == running[0]
    assert running[-1] == "torch"
    for name in running:
        assert choose_backend(name, CPU).name == name


def test_cpp_is_built() -> None:
    """Otherwise a mistake in csrc/ would only make everything slower, and these tests pass."""
    assert unavailable("cpp", "cpu") is None
    assert cpp_libraries.describe()["not built"] == {}


def test_unknown_backend() -> None:
    expected = f"backend: expected one of {', '.join(registry.BACKENDS)}; got 'cuda'"
    with pytest.raises(ValueError, match=expected):
        choose_backend("cuda", CPU)


def test_a_backend_that_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "unavailable", lambda name, device: f"{name} is not for {device}")
    forget_backends()
    with pytest.raises(ValueError, match="backend='cpp': does not run on cpu here: cpp is not"):
        choose_backend("cpp", CPU)
    forget_backends()


@pytest.mark.parametrize("backend", (CppBackend, TritonBackend))
def test_a_backend_refuses_what_it_has_no_kernel_for(backend: type[Backend]) -> None:
    """Of what is built in: each loss that is not in `KERNEL_LOSSES`.

    `tests/ops/test_losses.py` has what users bring.
    """
    for loss in LOSS_NAMES:
        spec = Spec("gelu", LOSSES.find(loss).text, "none", 1e-8, torch.float32)
        expected = None if loss in KERNEL_LOSSES else f"loss={spec.loss!r}"
        assert backend().refuses(spec) == expected
    for activation in KERNEL_ACTIVATIONS:
        assert backend().refuses(Spec(activation, "mse", "none", 1e-8, torch.float32)) is None
    other = Spec("other", "mse", "none", 1e-8, torch.float32)
    assert backend().refuses(other) == "activation='other'"


def test_triton_does_not_run_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert unavailable("triton", "cpu") is not None
    assert unavailable("cpp", "cuda") is not None
