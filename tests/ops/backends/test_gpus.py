# SPDX-License-Identifier: Apache-2.0
"""Which GPUs Triton runs on: each by itself, and none where nothing can be compiled.

No GPU is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from prereg_kernels.ops.backends.registry import choose_backend
from prereg_kernels.ops.backends.triton import backend
from prereg_kernels.ops.backends.triton.backend import unavailable
from prereg_kernels.ops.backends.triton.compiler import missing_compiler
from prereg_kernels.ops.gpus import nvidia_capability
from prereg_kernels.ops.spec import Spec
from tests.helpers import forget_backends


class Machine(NamedTuple):
    """GPUs that are not there, and a Triton."""

    gpus: list[tuple[int, int]]
    triton: str = "3.4.0"
    hip: str | None = None

    def pretend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        build = SimpleNamespace(impl=None)
        triton = SimpleNamespace(__version__=self.triton, knobs=SimpleNamespace(build=build))
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.setattr(torch.version, "hip", self.hip)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: self.gpus[device.index or 0]
        )


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    caches = (missing_compiler.cache_clear, backend._warn_once.cache_clear, forget_backends)
    for forget in caches:
        forget()
    yield
    for forget in caches:
        forget()


@pytest.mark.parametrize(
    ("version", "runs"),
    (("3.3.1", False), ("3.4.0", True), ("3.10.0+git1a2b", True), ("4.0", True)),
)
def test_oldest_triton(monkeypatch: pytest.MonkeyPatch, version: str, runs: bool) -> None:
    Machine([(9, 0)], version).pretend(monkeypatch)
    expected = None if runs else f"Triton {version} is too old: 3.4 is needed"
    assert unavailable("cuda") == expected


def test_an_old_gpu_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine([(9, 0), (7, 5), (8, 0)]).pretend(monkeypatch)
    chosen = [choose_backend("auto", torch.device("cuda", i)).name for i in range(3)]
    assert chosen == ["triton", "torch", "triton"]
    reason = "GPU 1 has compute capability 7.5: 8.0 is needed"
    assert [unavailable(f"cuda:{i}") for i in range(3)] == [None, reason, None]
    with pytest.raises(ValueError, match=f"does not run on cuda:1 here: {reason}"):
        choose_backend("triton", torch.device("cuda", 1))
    assert choose_backend("triton", torch.device("cuda")).name == "triton"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_backend("auto", torch.device("cuda")).name == "torch"


def test_numbers_of_amds_gpus_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """(9, 4) is an MI300, and no Hopper; (9, 0) an MI200; RDNA's first is (10, 1)."""
    for number in ((9, 4), (9, 0), (10, 1), (7, 0)):
        Machine([number], hip="6.4").pretend(monkeypatch)
        gpu = torch.device("cuda", 0)
        assert nvidia_capability(gpu) is None and unavailable(gpu) is None
        Machine([number]).pretend(monkeypatch)
        assert nvidia_capability(gpu) == number


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_no_compiler_is_one_warning(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    """Not an error in the first launch, which is in backward."""
    Machine([(9, 0), (9, 0)]).pretend(monkeypatch)
    with pytest.warns(UserWarning, match="without its Triton kernels.*: no C compiler") as found:
        for name in ("cosine", "mse"):
            for gpu in range(2):
                spec = Spec("gelu", name, "none", 1e-8, torch.bfloat16)
                assert choose_backend("auto", torch.device("cuda", gpu), spec).name == "torch"
    assert len(found) == 1
    with pytest.raises(ValueError, match="no C compiler was found: install gcc or clang"):
        choose_backend("triton", torch.device("cuda", 0))


def test_a_compiler_is_asked_once_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine([(9, 0)]).pretend(monkeypatch)
    asked = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: asked.append(a) or run(*a, **k))
    for _ in range(3):
        assert missing_compiler() is None
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("cc", "reason"),
    (
        ("/nowhere/cc", "'/nowhere/cc' does not run: "),
        ("false", "'false' cannot compile against Python: exit status 1"),
        ("no-headers", "'.*/no-headers' cannot compile against Python: .*error: .*Python.h"),
    ),
)
def test_a_compiler_that_is_no_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cc: str, reason: str
) -> None:
    if cc == "no-headers":
        script = tmp_path / cc
        script.write_text("#!/bin/sh\nexec cc -E -I/nowhere - < /dev/stdin\n")
        script.chmod(0o755)
        cc = str(script)
    Machine([(9, 0)]).pretend(monkeypatch)
    monkeypatch.setenv("CC", cc)
    assert re.match(f"the C compiler {reason}", str(unavailable("cuda")))


def test_another_way_to_build(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    Machine([(9, 0)]).pretend(monkeypatch)
    assert unavailable("cuda") is not None
    missing_compiler.cache_clear()
    sys.modules["triton"].knobs.build.impl = lambda *_: ""
    assert unavailable("cuda") is None
