# SPDX-License-Identifier: Apache-2.0
"""Rates of a CPU follow from measured rows, and so does the error that is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prereg_kernels.estimate import cpu

ROOT = Path(__file__).parents[2]
RATES = {2: (2e-12, 3e-10, 0.0), 4: (1e-11, 2e-10, 2e-6)}
OVERHEAD = {2: 5e6, 4: 7e6}


def rows(noise: float = 0.0) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    found = []
    for itemsize in RATES:
        for _ in range(7):
            row: dict[str, Any] = {
                "itemsize": itemsize, "flops": generator.uniform(1e10, 1e11),
                "moved": generator.uniform(1e8, 3e9), "calls": generator.uniform(1e3, 9e3),
                "counted_bytes": generator.uniform(1e8, 9e8),
            }  # fmt: skip
            exact = cpu.guess(row, RATES, OVERHEAD)
            row["seconds"] = exact["seconds"] * (1 + noise * generator.uniform(-1, 1))
            row["bytes"] = exact["bytes"]
            found.append(row)
    return {"machine": {"device": "a CPU"}, "rows": found}


def test_exact_rows_give_their_rates() -> None:
    found = cpu.calibrated(rows())
    for itemsize, rates in RATES.items():
        assert found.rates[itemsize] == pytest.approx(rates, rel=1e-6, abs=1e-15)
    assert found.overhead == pytest.approx(OVERHEAD)
    assert max(found.error.values()) < 1e-9


def test_an_error_is_of_rows_left_out() -> None:
    results = rows(noise=0.3)
    found = cpu.calibrated(results)
    errors = []
    for number, row in enumerate(results["rows"]):
        others = results["rows"][:number] + results["rows"][number + 1 :]
        rates = cpu.calibrated({**results, "rows": others}).rates
        errors.append(abs(row["seconds"] / cpu.guess(row, rates, OVERHEAD)["seconds"] - 1))
    assert found.error["seconds"] == pytest.approx(np.quantile(errors, 0.9))
    assert found.median["seconds"] == pytest.approx(np.median(errors))
    assert found.error["seconds"] > 0.1


def test_what_ships_was_measured() -> None:
    results = json.loads((ROOT / "benchmarks/results/estimate_cpu.json").read_text())
    assert json.loads(cpu.FILE.read_text()) == results
    assert cpu.calibration() == cpu.calibrated(results)


def test_half_of_the_rows() -> None:
    found = cpu.calibration()
    assert found.median["seconds"] < 0.2
    assert found.median["bytes"] < 0.1
