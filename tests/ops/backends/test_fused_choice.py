# SPDX-License-Identifier: Apache-2.0
"""Fused stages: off, not imported, and by PREREG_FUSED alone. No GPU, and no Triton, is needed."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prereg_kernels.ops import custom_ops, dtypes
from prereg_kernels.ops.backends import registry
from prereg_kernels.ops.backends.torch import TorchBackend
from prereg_kernels.ops.backends.triton.fused import quack
from prereg_kernels.ops.gpus import nvidia_capability
from tests.helpers import check, forget_backends, make_problem, relative_error
from tests.ops.backends.quack_signatures import install

# The whole of a call, forward and backward, with whatever backend there is here
DEFAULT = """
import sys, torch
from prereg_kernels import fused_pre_loss, pre_tap
from prereg_kernels.ops.backends import registry
hidden = torch.randn(4, 8, requires_grad=True)
head = [torch.randn(16, 8), torch.randn(8, 16)], [torch.zeros(16), torch.zeros(8)]
for call in (fused_pre_loss, lambda *args: pre_tap(*args)[1]):
    call(hidden, torch.randn(4, 8), *head).backward()
registry._class("triton")
assert "prereg_kernels.ops.backends.triton.backend" in sys.modules
print(*[name for name in sys.modules if ".triton.fused" in name or name.startswith("quack")])
"""


FIND, IS_NEW_ENOUGH = quack.find_quack, quack._is_new_enough


def forget() -> None:
    for cached in (registry._class, FIND, IS_NEW_ENOUGH):
        cached.cache_clear()
    forget_backends()


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    forget()
    yield
    forget()


def test_the_default_path_does_not_import_them() -> None:
    run = subprocess.run(
        [sys.executable, "-c", DEFAULT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize(
    ("setting", "name"),
    (
        (None, "TritonBackend"),
        ("", "TritonBackend"),
        ("triton", "FusedTritonBackend"),
        ("quack", "QuackBackend"),
    ),
)
def test_which_class(monkeypatch: pytest.MonkeyPatch, setting: str | None, name: str) -> None:
    if setting is None:
        monkeypatch.delenv("PREREG_FUSED", raising=False)
    else:
        monkeypatch.setenv("PREREG_FUSED", setting)
    assert registry._class("triton").__name__ == name
    assert registry._class("torch") is TorchBackend


def test_a_name_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREREG_FUSED", "cutlass")
    with pytest.raises(ValueError, match="PREREG_FUSED: expected one of triton, quack; got 'cut"):
        registry._class("triton")


class Quack(quack.QuackStages, TorchBackend):
    """On a CPU, beside plain rows."""


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(quack, "_is_new_enough", lambda device: True)
    return install(monkeypatch)


@pytest.mark.parametrize("keeps_u", (True, False))
@pytest.mark.parametrize("with_bias", (True, False))
def test_activate(called: list[str], keeps_u: bool, with_bias: bool) -> None:
    x, weight = draw(24, 16, seed=0), draw(32, 16, seed=1)
    bias = draw(32, seed=2) if with_bias else None
    g = torch.full((24, 32), math.nan, dtype=torch.bfloat16)
    u = torch.full_like(g, math.nan) if keeps_u else g
    Quack().linear_activate(x, weight, bias, "gelu", u, g)
    true = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert called == ["gemm_act"]
    assert torch.equal(g, torch.nn.functional.gelu(true).bfloat16())
    assert not keeps_u or torch.equal(u, true.bfloat16())


@pytest.mark.parametrize("with_sums", (True, False))
def test_backward_activation(called: list[str], with_sums: bool) -> None:
    d, weight, u = draw(24, 16, seed=0), draw(16, 32, seed=1), draw(24, 32, seed=2)
    du = torch.full((24, 32), math.nan, dtype=torch.bfloat16)
    sums = torch.ones(32) if with_sums else None
    Quack().linear_backward_activation(d, weight, u, None, "gelu", du, sums)
    leaf = u.double().requires_grad_()
    dg = d.double() @ weight.double()
    [true] = torch.autograd.grad(torch.nn.functional.gelu(leaf), [leaf], dg)
    assert called == ["dact_dbias_mod" if with_sums else "gemm_dact"]
    assert torch.equal(du, true.bfloat16())
    assert sums is None or relative_error(sums, true.sum(0)) < 1e-6


def test_what_it_does_not_take(called: list[str]) -> None:
    """Then the stage is the other backend's."""
    x, weight = draw(24, 16, seed=0), draw(32, 16, seed=1)
    for activation, dtype, columns in (
        ("silu", torch.bfloat16, 32),
        ("gelu", torch.float32, 32),
        ("gelu", torch.bfloat16, 31),  # rows that start anywhere
    ):
        g = torch.empty(24, columns, dtype=dtype)
        Quack().linear_activate(x.to(dtype), weight[:columns].to(dtype), None, activation, g, g)
        assert called == [] and g.isfinite().all()


def test_the_whole_op(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error rule holds, in several chunks."""
    monkeypatch.setattr(custom_ops, "choose_backend", lambda *_: Quack())
    monkeypatch.setattr(dtypes, "_native_on_cpu", lambda _: True)
    index = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    problem = make_problem((3, 20), (16, 32, 24), dtype=torch.bfloat16, visual_index=index)
    check(problem, chunk_rows=16)
    assert {"gemm_act", "dact_dbias_mod"} <= set(called)


def test_not_installed_is_one_warning_and_triton_s_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quack, "_is_new_enough", lambda device: True)
    monkeypatch.setitem(sys.modules, "quack", None)
    x, weight = draw(24, 16, seed=0), draw(32, 16, seed=1)
    g = torch.empty(24, 32, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="PREREG_FUSED=quack: no stage is fused") as found:
        for _ in range(3):
            Quack().linear_activate(x, weight, None, "gelu", g, g)
    assert len(found) == 1 and g.isfinite().all()


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    (
        ((9, 0), None, True),
        ((10, 3), None, True),
        ((8, 0), None, False),
        ((12, 0), None, False),
        ((9, 4), "6.4", False),
    ),
)
def test_which_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert (nvidia_capability(gpu) is None) == (hip is not None)
    assert quack._is_new_enough(gpu) == expected
    assert not quack._is_new_enough(torch.device("cpu"))
