# SPDX-License-Identifier: Apache-2.0
"""Which libraries of the C++ kernels are used, why none is, and what a user is told to run."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels.ops.backends import cpp_libraries, registry
from prereg_kernels.ops.backends.cpp import CppBackend, unavailable
from prereg_kernels.ops.backends.cpp_build import RECORD, VARIANTS, digest, library
from prereg_kernels.ops.backends.cpp_libraries import build_folders, describe, runnable_variants
from tests.helpers import forget_backends

Record = dict[str, Any]


class Installed:
    """A package whose libraries were built for here, with a record that a test can change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = {"sources": digest(cpp_libraries.CSRC), "torch": torch.__version__}
        self.record |= {"compiler": "c++ 12", "variants": list(VARIANTS), "failed": {}}
        self.write()

    def write(self, folder: Path | None = None, **changes: Any) -> None:
        """The record with these changes; into the package, where no other folder is given."""
        target = folder or self.folder
        target.mkdir(parents=True, exist_ok=True)
        (target / RECORD).write_text(json.dumps(self.record | changes))
        cpp_libraries.find_libraries.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    monkeypatch.setattr(cpp_libraries, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    forget_backends()
    yield Installed(tmp_path / "package")
    forget_backends()
    cpp_libraries.find_libraries.cache_clear()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """The libraries that are loaded, which is not done."""
    calls: list[tuple[Path, str]] = []
    monkeypatch.setattr(cpp_libraries, "load", lambda *arguments: calls.append(arguments))
    return calls


def test_what_is_installed_is_used(installed: Installed, loaded: list[tuple[Path, str]]) -> None:
    assert unavailable("cuda") == "it is for CPUs only"
    assert unavailable("cpu") is None
    best = runnable_variants()[0]
    assert set(loaded) == {(installed.folder, best)}
    installed.write(variants=["base"], failed={"avx2": "no such flag"})
    assert runnable_variants() == ["base"]
    assert describe() == {
        "variant": "base",
        "built": ["base"],
        "not built": {"avx2": "no such flag"},
        "compiler": "c++ 12",
        "torch": torch.__version__,
        "from": str(installed.folder),
    }


FAILED: Record = {"variants": [], "failed": {"base": "an error", "avx2": "an error"}}
REASONS: list[tuple[Record, str]] = [
    (
        {"torch": "2.0.1+cpu"},
        f"built against torch 2.0.1+cpu, this is {torch.__version__}: run `prereg build`",
    ),
    ({"sources": "0" * 64}, "built from other sources than csrc/: run `prereg build`"),
    (FAILED, "not built: an error"),
]


@pytest.mark.parametrize(("changes", "reason"), REASONS, ids=("torch", "sources", "failed"))
def test_unavailable_says_why(installed: Installed, changes: Record, reason: str) -> None:
    installed.write(**changes)
    assert unavailable("cpu") == reason
    assert describe()["variant"] is None
    with pytest.raises(ValueError) as caught:
        CppBackend()
    assert str(caught.value) == f"the compiled row primitives: {reason}"


def test_nothing_was_built(installed: Installed) -> None:
    del installed.record["torch"]  # there was none
    installed.write(**FAILED)
    assert unavailable("cpu") == "not built: an error: run `prereg build`"
    (installed.folder / RECORD).unlink()
    cpp_libraries.find_libraries.cache_clear()
    assert unavailable("cpu") == "not built: run `prereg build`"
    assert describe()["from"] is None


def test_a_broken_library_is_a_reason(installed: Installed) -> None:
    for variant in VARIANTS:
        (installed.folder / library(variant)).write_bytes(b"not a library")
    reason = str(unavailable("cpu"))
    assert reason.startswith("its library does not load: ")
    assert reason.endswith(": run `prereg build`")


def test_libraries_of_prereg_build(
    installed: Installed, loaded: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are used where those of the installation do not run, and only there."""
    monkeypatch.setattr(cpp_libraries, "IS_CHECKOUT", False)
    folder, objects = build_folders()
    assert folder.is_relative_to(os.environ["TORCH_EXTENSIONS_DIR"])
    assert objects.parent == folder
    installed.write(folder)
    assert unavailable("cpu") is None and describe()["from"] == str(installed.folder)
    installed.write(torch="2.0.1+cpu")
    assert unavailable("cpu") is None and describe()["from"] == str(folder)
    assert loaded[-1] == (folder, runnable_variants()[0])
    installed.write(folder, **FAILED)
    assert unavailable("cpu") == "not built: an error"


def test_prereg_build_in_a_checkout(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """It renews what setup.py has built, where it may write."""
    monkeypatch.setattr(cpp_libraries, "IS_CHECKOUT", True)
    top = installed.folder.parent
    assert build_folders() == (installed.folder, top / "build" / "rows")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert build_folders()[0] == cpp_libraries._cache_folder()


def test_the_cache_is_of_one_torch_and_one_set_of_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cpp_libraries._cache_folder()
    assert folder.parent == tmp_path / "torch_extensions" / "prereg_kernels"
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu130")
    of_another_torch = cpp_libraries._cache_folder()
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")  # the same CPU interface
    assert cpp_libraries._cache_folder() == of_another_torch != folder
    shutil.copytree(cpp_libraries.CSRC, tmp_path / "csrc")
    (tmp_path / "csrc" / "rows.h").write_text("// others")
    monkeypatch.setattr(cpp_libraries, "CSRC", tmp_path / "csrc")
    assert cpp_libraries._cache_folder() != of_another_torch


@pytest.mark.parametrize(
    ("changes", "compiler", "told"),
    (
        ({"torch": "2.0.1+cpu"}, "sh", "built against torch 2.0.1+cpu"),
        ({"sources": "0" * 64}, "sh", "built from other sources"),
        ({"torch": "2.0.1+cpu"}, "/nowhere/c++", None),  # `prereg build` could not help
        (FAILED, "sh", None),  # nor here
    ),
    ids=("torch", "sources", "no compiler", "failed"),
)
def test_the_first_use_says_what_to_run(
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
    changes: Record,
    compiler: str,
    told: str | None,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(registry, "FASTEST_FIRST", ("triton", "cpp", "torch"))
    installed.write(**changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert registry.choose_backend("torch", torch.device("cpu")).name == "torch"
        for _ in range(2):
            assert registry.choose_backend("auto", torch.device("cpu")).name == "torch"
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (told is not None)
    for message in messages:
        assert str(told) in message and message.endswith(": run `prereg build`")
