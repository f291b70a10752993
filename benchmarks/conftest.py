# SPDX-License-Identifier: Apache-2.0
"""The suites: `pytest benchmarks --benchmark-only` runs those that this machine can run.

    pytest benchmarks --benchmark-only -k "tap and 512"    # sets up nothing else
    pytest benchmarks --benchmark-only --size tiny         # all, at sizes of no importance

Suites of a GPU are deselected where there is none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.common.machine import machine
from benchmarks.common.replay import BYTES
from benchmarks.loss.cases import Case, tiny

DESELECTED = pytest.StashKey[int]()
FEW_SAMPLES = 200  # of a benchmark, in a file


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=("full", "tiny"), default="full",
        help="tiny: problems of no importance, those of a GPU on the CPU",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: of a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("size") == "tiny":
        return
    gone = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if item not in gone]
    config.hook.pytest_deselected(items=gone)
    config.stash[DESELECTED] = len(gone)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if count := config.stash.get(DESELECTED, 0):
        terminalreporter.write_line(f"deselected: {count} benchmarks of a GPU, as none is here")


def pytest_benchmark_scale_unit(unit: str, benchmarks: list[Any]) -> tuple[str, float] | None:
    """The heading of a table of bytes is "time in MiB instead of seconds"."""
    is_bytes = all(b["extra_info"].get("unit") == BYTES for b in benchmarks)
    return ("MiB instead of second", 2.0**-20) if unit == "seconds" and is_bytes else None


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """What two runs that are compared should share."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = ("date", "commit", "dirty")
    return {key: value for key, value in machine(device).items() if key not in own}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Short calls have thousands of samples."""
    for benchmark in output_json["benchmarks"]:
        if len(benchmark["stats"].get("data", ())) > FEW_SAMPLES:
            del benchmark["stats"]["data"]


@pytest.fixture(scope="session")
def is_tiny(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("size") == "tiny")


@pytest.fixture(scope="session")
def device(is_tiny: bool) -> torch.device:
    """Where a suite of a GPU runs."""
    return torch.device("cpu" if is_tiny else "cuda")


@pytest.fixture(scope="session")
def sized(is_tiny: bool) -> Any:
    """A case, or what is left of it."""

    def sized(case: Case) -> Case:
        return tiny(case) if is_tiny else case

    return sized
