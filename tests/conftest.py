# SPDX-License-Identifier: Apache-2.0
"""Settings of every test: one thread, the same generated examples on every run, the backend.

Fuzzers alone, by `make fuzz`, draw other examples on every run.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prereg_kernels.cli.commands import main
from prereg_kernels.ops import dtypes
from prereg_kernels.ops.activations import ACTIVATIONS
from prereg_kernels.ops.backends import registry
from prereg_kernels.ops.losses import LOSSES
from tests import workers

PACKAGES = ("peft", "transformers")  # of which make runs the tests with several versions
torch.set_num_threads(1)

if importlib.util.find_spec("hypothesis"):  # tests/gpu runs where only torch and pytest are
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable",
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    # What fails is kept in .hypothesis, tried first the next time, and printed to be repeated.
    settings.register_profile(
        "fuzz",
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("fuzz" if "FUZZ" in os.environ else "repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=("torch", "cpp"), help="what backend='auto' is here")
    for package in PACKAGES:
        parser.addoption(f"--{package}", help="the version of it that has to be the one imported")


pytest_xdist_make_scheduler = workers.pytest_xdist_make_scheduler


def pytest_configure(config: pytest.Config) -> None:
    for package in PACKAGES:
        expected = config.getoption(f"--{package}")
        if expected is not None and (found := importlib.metadata.version(package)) != expected:
            raise pytest.UsageError(f"--{package} {expected}: found {found}")
    backend = config.getoption("--backend")
    if backend is None:
        return
    if reason := registry.unavailable(backend, "cpu"):
        raise pytest.UsageError(f"--backend {backend}: {reason}")
    registry.FASTEST_FIRST = (backend, "torch")


@pytest.fixture(autouse=True, scope="module")
def libraries_stay() -> None:
    """The collector leaves alone what was there before a module's fixtures, most of it imported: it
    takes a second to look through, which trainers do at the end of each run. A run with workers has
    the collector look at everything again."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


_COMPILATION = "ACCELERATE_DYNAMO_"


@pytest.fixture(autouse=True)
def new_gradient_state() -> Iterator[None]:
    """Accelerate keeps it for the process: a loop that stopped between two micro-batches leaves its
    "no step now" to every loop after it, whose optimizers then do nothing."""
    yield
    if (states := sys.modules.get("accelerate.state")) is not None:
        states.GradientState._reset_state()
        states.GradientState()  # for what still lives: all share one dict


@pytest.fixture(autouse=True)
def own_compilation() -> Iterator[None]:
    """TrainingArguments(torch_compile=True) says so in the environment, and every model of every
    later trainer of the process is compiled."""
    before = {name: x for name, x in os.environ.items() if name.startswith(_COMPILATION)}
    yield
    for name in [name for name in os.environ if name.startswith(_COMPILATION)]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, as examples in docstrings do, is gone after it."""
    for known in (LOSSES, ACTIVATIONS):
        for name in ("_by_name", "_by_text"):
            monkeypatch.setattr(known, name, dict(getattr(known, name)))


@pytest.fixture(params=("native", "emulated"))
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test as on a CPU with arithmetic of low precision, and as on one without."""
    monkeypatch.setattr(dtypes, "_native_on_cpu", lambda _: request.param == "native")


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and every file gets half of its content, then an error."""
    write = Path.write_bytes

    def write_half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError("No space left on device")

    return lambda: monkeypatch.setattr(Path, "write_bytes", write_half)


@pytest.fixture
def prereg_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in this process, as importing everything anew takes seconds."""

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["prereg", *arguments])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which it replaces
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())

    return run
