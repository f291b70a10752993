# SPDX-License-Identifier: Apache-2.0
"""prereg doctor: one screen, the reasons, JSON, and no need of anything optional."""

from __future__ import annotations

import json
import subprocess
import sys
from email.message import Message
from importlib import metadata

import pytest
import torch

from prereg_kernels._version import __version__
from prereg_kernels.cli import doctor
from prereg_kernels.ops.activations import ACTIVATIONS
from prereg_kernels.ops.backends import registry
from prereg_kernels.ops.backends.torch import TorchBackend
from prereg_kernels.ops.losses import LOSSES
from prereg_kernels.ops.spec import Spec
from tests.helpers import forget_backends


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'prereg'; from prereg_kernels.cli import main; main()"
    command = [sys.executable, "-c", code, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_screen() -> None:
    done = run()
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    for expected in (f"prereg_kernels  {__version__}", f"torch           {torch.__version__}"):
        assert any(expected in line for line in lines), expected
    assert any(line.split()[:1] == ["threads"] for line in lines)


def test_json_says_the_same() -> None:
    report = json.loads(run("--json").stdout)
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(report) == {"versions", "cpu", "gpu", "backends", "cpp rows"}
    assert report["versions"]["accelerate"] == metadata.version("accelerate")
    assert {"peft", "trl", "torchvision"} <= report["versions"].keys()
    assert report["versions"]["extras"]["train"] == "installed"
    assert list(report["backends"]) == list(registry.BACKENDS)
    assert report["backends"]["torch"] == "runs"


def test_extras_and_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra that names another one needs what that one does."""
    about = Message()
    for extra in ("small", "large", "same", "none"):
        about["Provides-Extra"] = extra
    for requirement in (
        "torch>=2",
        "rich; extra == 'small'",
        "no-such-package>=1.0,<2; extra == 'small'",
        'prereg-kernels[small]; extra == "large"',
        'nor_this_one[all]~=3; (sys_platform == "linux") and extra == "large"',
        "prereg-kernels[large]; extra == 'same'",
    ):
        about["Requires-Dist"] = requirement
    versions = {"rich": "1"}
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: about)
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "not installed"))
    assert doctor.examine()["versions"]["extras"] == {
        "small": "lacks no-such-package",
        "large": "lacks no-such-package, nor_this_one",
        "same": "lacks no-such-package, nor_this_one",
        "none": "installed",
    }
    versions |= {"no-such-package": "1", "nor_this_one": "3"}
    assert set(doctor.examine()["versions"]["extras"].values()) == {"installed"}


TAKEN = "transformers >=4.57,<6, tested with 4.57.6, 5.6.0, 5.16.1, 5.17.0, 5.24.0"


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ("5.18.0", TAKEN),
        ("not installed", TAKEN),
        ("6.0.1", f"{TAKEN}; 6.0.1 is out of bounds"),
    ],
)
def test_bounds_of_transformers(monkeypatch: pytest.MonkeyPatch, here: str, said: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: here)
    assert doctor.examine()["versions"]["supported"] == said


def test_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(name: str, device: str) -> str | None:
        return None if name == "torch" else f"no {name} on {device}, because of a reason"

    monkeypatch.setattr(doctor, "unavailable", reason)
    monkeypatch.setattr(registry, "unavailable", reason)
    forget_backends()
    try:
        text = doctor.show(doctor.examine())
    finally:
        forget_backends()
    assert "auto            torch, on cpu" in text
    assert "does not run here: no cpp on cpu, because of a reason" in text
    assert "does not run here: no triton on cpu, because of a reason" in text


def test_losses_without_a_kernel_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: TorchBackend, spec: Spec) -> str | None:
        return f"loss={spec.loss!r}" if spec.loss.startswith("huber") else None

    monkeypatch.setattr(TorchBackend, "refuses", refuses)
    facts = doctor.examine()["backends"]
    assert facts["torch"] == "runs; leaves huber to the next backend"


def test_what_one_refusal_leaves_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of one loss and two activations leaves the other losses and activations alone."""

    def refuses(self: TorchBackend, spec: Spec) -> str | None:
        if spec.activation not in ("relu", "silu"):
            return f"activation={spec.activation!r}"
        return None if spec.loss == "mse" else f"loss={spec.loss!r}"

    monkeypatch.setattr(TorchBackend, "refuses", refuses)
    names = (*LOSSES.names, *ACTIVATIONS.names)
    left = ", ".join(name for name in names if name not in ("mse", "silu", "relu"))
    assert doctor.examine()["backends"]["torch"] == f"runs; leaves {left} to the next backend"


def test_without_a_compiler_or_an_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "a-package-that-nobody-has"))
    report = doctor.examine()
    assert report["cpu"]["compiler"] == "none found"
    assert report["versions"]["a-package-that-nobody-has"] == "not installed"
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "does not run" in doctor.examine()["cpu"]["compiler"]


def test_variants_that_were_not_built_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"variant": "avx2", "built": ["base", "avx2"], "not built": {"avx512": "no such flag"}}
    monkeypatch.setattr(doctor, "describe", lambda: facts)
    lines = [line.split(maxsplit=1) for line in doctor.show(doctor.examine()).splitlines()]
    assert ["variant", "avx2"] in lines and ["built", "base, avx2"] in lines
    assert any(line[-1].endswith("avx512 (no such flag)") for line in lines)


def test_cpu_without_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "operand_dtype", lambda dtype, device: torch.float32)
    assert doctor.examine()["cpu"]["emulated"] == "bfloat16, float16: products run in float32"
    monkeypatch.setattr(doctor, "operand_dtype", lambda dtype, device: dtype)
    assert doctor.examine()["cpu"]["emulated"] == "nothing"
