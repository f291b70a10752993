# SPDX-License-Identifier: Apache-2.0
"""The bounds of transformers: one truth for pip, for the warning and for the doctor."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from prereg_kernels import apply_pre
from prereg_kernels._util import supported
from prereg_kernels.cli import main
from tests.tiny import tiny_llava

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
MAKEFILE = PROJECT.with_name("Makefile")


@pytest.fixture(autouse=True)
def not_said_yet() -> None:
    supported.check_transformers.cache_clear()


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [
        ("5.17.0", True),
        ("5.17.0.dev0", True),
        ("5.100.2", True),
        ("4.57.1", True),
        ("5.0.0", True),
        ("4.56.2", False),
        ("6.0.0", False),
        ("6.0.0rc1", False),
        ("10.17", False),
        ("main", False),
    ],
)
def test_bounds(version: str, is_supported: bool) -> None:
    assert supported.is_supported(version) == is_supported


def test_the_metadata_has_the_same_bounds() -> None:
    assert PROJECT.read_text().count(f'"transformers{supported.bounds()}"') == 2
    assert PROJECT.read_text().count('"transformers>') == 2


def test_what_is_pinned_is_what_was_tested() -> None:
    constraints = PROJECT.with_name("constraints.txt").read_text()
    pinned = re.search(r"^transformers==(.*)$", constraints, re.MULTILINE)
    folders = re.search(r"^TRANSFORMERS := (.*)$", MAKEFILE.read_text(), re.MULTILINE)
    assert pinned is not None and folders is not None
    assert {pinned[1], *folders[1].split()} == set(supported.TESTED)
    assert all(map(supported.is_supported, supported.TESTED))
    assert supported.TESTED[0].startswith("{}.{}.".format(*supported.TRANSFORMERS[0]))


def test_readme_says_what_is_taken_and_tested() -> None:
    (first, end), newest = supported.TRANSFORMERS, supported.TESTED[-1].rpartition(".")[0]
    said = f"takes transformers from {first[0]}.{first[1]} up to {end[0]}, and was tested up to "
    readme = " ".join(PROJECT.with_name("README.md").read_text().split())
    assert f"{said}{newest} (" in readme


def test_another_release_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tiny_llava(), tiny_llava()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.1.0")
    with pytest.warns(UserWarning, match=r"expected >=4\.57,<6, got 6\.1\.0"):
        apply_pre(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_pre(second)


def test_the_release_here_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_pre(tiny_llava())


@pytest.mark.parametrize("command", (["train", "x.yaml"], ["evaluate", "m", "--data", "d.json"]))
def test_a_release_that_is_too_old_to_train(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, in place of an import that fails."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.5.2")
    monkeypatch.setattr(sys, "argv", ["prereg", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "prereg: transformers: `prereg train`, `assemble` and `evaluate` need 5.6 or newer, got "
        "5.5.2; with an older one, train by PReTrainer or by another trainer\n"
    )
    for version in ("5.6.0", "5.17.0.dev0", "6.0.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert supported.too_old_to_train() is None


def test_torchvision_is_the_one_for_the_torch_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's is built for CUDA: beside a torch for CPUs it cannot be imported."""
    for version, advice in (
        ("2.13.0", "pip install torchvision 'torch==2.13.0'"),
        ("2.13.0+cpu", "install it from where torch 2.13.0+cpu came from: https://pytorch.org/"),
    ):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert supported.install_torchvision().startswith(advice)


def test_a_torchvision_that_cannot_be_imported(tmp_path: Path) -> None:
    """It is there, so what brings the missing packages would mend nothing."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import ops\n")
    (package / "ops.py").write_text("import torch\n\ntorch.ops.torchvision.nms.default\n")
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Version: 0.1\n")
    paths = f"{tmp_path}:{PROJECT.parent}"
    command = ["assemble", "--vision", "clip", "--llm", "llama", "--out", "llava"]
    done = subprocess.run(
        [sys.executable, "-m", "prereg_kernels", *command], cwd=tmp_path, text=True,
        env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "prereg: torchvision is here, but could not be imported: '_OpNamespace' 'torchvision' "
        "object has no attribute 'nms'; it has to be a build for your torch: "
        f"{supported.install_torchvision()}\n"
    )


def test_what_is_missing_is_told_with_what_brings_it() -> None:
    with pytest.raises(ModuleNotFoundError) as missing:
        importlib.import_module("a_module_that_nobody_has")
    told = "No module named 'a_module_that_nobody_has'; it needs: pip install it"
    assert supported.not_imported(missing.value, "it needs: pip install it") == told
    unnamed = ImportError("cannot import name 'x' from 'y'")  # raised in nobody's module
    assert supported.not_imported(unnamed, "it needs: pip install it") == str(unnamed)
