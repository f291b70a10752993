"""The choice of a backend, and what is said where one does not run."""

from __future__ import annotations

import shutil

import pytest
import torch

from prereg_kernels.ops.backends import cpp, registry
from prereg_kernels.ops.backends.registry import FASTEST_FIRST, choose_backend, unavailable

CPU = torch.device("cpu")


def test_auto_is_the_first_that_runs() -> None:
    running = [name for name in FASTEST_FIRST if unavailable(name, "cpu") is None]
    assert choose_backend("auto", CPU).name == running[0]
    assert running[-1] == "torch"
    for name in running:
        assert choose_backend(name, CPU).name == name


def test_cpp_is_built_where_there_is_a_compiler() -> None:
    """Otherwise a mistake in csrc/ would only make everything slower, and these tests pass."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine")
    assert unavailable("cpp", "cpu") is None
    assert cpp.describe()["not built"] == {}


def test_unknown_backend() -> None:
    expected = "backend: expected one of auto, triton, cpp, torch; got 'cuda'"
    with pytest.raises(ValueError, match=expected):
        choose_backend("cuda", CPU)


def test_a_backend_that_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "unavailable", lambda name, device: f"{name} is not for {device}")
    registry._choose.cache_clear()
    with pytest.raises(ValueError, match="backend='cpp': does not run on cpu here: cpp is not"):
        choose_backend("cpp", CPU)
    registry._choose.cache_clear()


def test_triton_does_not_run_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert unavailable("triton", "cpu") is not None
    assert unavailable("cpp", "cuda") is not None
