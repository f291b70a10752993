# SPDX-License-Identifier: Apache-2.0
"""How fast a CPU is, by steps that were measured: benchmarks/step/cpu.py wrote `cpu.json`.

A step's seconds are its products, its bytes and its calls, each at a rate of its own, by least
squares of the relative errors. The error of an estimate is what the rows say of each other: each
row's, by the rates that all others give.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from prereg_kernels.estimate.devices import Device

FILE = Path(__file__).parent / "cpu.json"
FEATURES = ("flops", "moved", "calls")
LEAST = 3
"""Rows of a dtype, without which there are no rates."""
Row = dict[str, Any]
Rates = dict[int, tuple[float, ...]]


@dataclass(frozen=True)
class Calibration:
    """Of one machine.

    Attributes:
        machine: its processor.
        rates: {bytes of an element: seconds for each of `FEATURES`}.
        overhead: {bytes of an element: bytes of a process, beyond what the memory model counts}.
        error: {"seconds", "bytes": what nine tenths of the rows, each left out, are closer than}.
        median: the same for half of them.
    """

    machine: str
    rates: dict[int, tuple[float, ...]]
    overhead: dict[int, float]
    error: dict[str, float]
    median: dict[str, float]

    def device(self, itemsize: int) -> Device:
        """As a device whose calls and arithmetic do not overlap."""
        flop, byte, call = self.rates[itemsize]
        return Device(
            0.0, {itemsize: 1 / max(flop, 1e-30)}, 1 / max(byte, 1e-30), 1.0, 1.0, call, 1,
            overlaps=False,
        )  # fmt: skip


@cache
def calibration() -> Calibration:
    """By the rows that ship."""
    return calibrated(json.loads(FILE.read_text()))


def calibrated(results: dict[str, Any]) -> Calibration:
    """By a results file's rows."""
    rows = results["rows"]
    left = [left_out(rows, number) for number in range(len(rows))]
    errors = {
        name: [abs(row[name] / told[name] - 1) for row, told in zip(rows, left, strict=True)]
        for name in ("seconds", "bytes")
    }
    return Calibration(
        results["machine"]["device"],
        _rates(rows),
        _overhead(rows),
        {name: float(np.quantile(found, 0.9)) for name, found in errors.items()},
        {name: float(np.median(found)) for name, found in errors.items()},
    )


def guess(
    row: Row, rates: dict[int, tuple[float, ...]], overhead: dict[int, float]
) -> dict[str, float]:
    """The row's time and memory, by rates of other rows."""
    seconds = sum(x * row[name] for x, name in zip(rates[row["itemsize"]], FEATURES, strict=True))
    return {"seconds": seconds, "bytes": row["counted_bytes"] + overhead[row["itemsize"]]}


def left_out(rows: Sequence[Row], number: int) -> dict[str, float]:
    """A row's time and memory, by the rates of all others."""
    others = [row for place, row in enumerate(rows) if place != number]
    return guess(rows[number], _rates(others), _overhead(others))


def _rates(rows: Sequence[Row]) -> dict[int, tuple[float, ...]]:
    found = {}
    for itemsize in sorted({row["itemsize"] for row in rows}):
        of_dtype = [row for row in rows if row["itemsize"] == itemsize]
        assert len(of_dtype) >= LEAST, "too few rows"
        shares = [[row[name] / row["seconds"] for name in FEATURES] for row in of_dtype]
        found[itemsize] = _not_negative(np.array(shares))
    return found


def _not_negative(shares: Any) -> tuple[float, ...]:
    """The least squares of shares @ rates = 1 with no rate below 0: the best of all subsets."""
    best: tuple[float, tuple[float, ...]] | None = None
    columns = range(shares.shape[1])
    for size in range(1, shares.shape[1] + 1):
        for chosen in combinations(columns, size):
            part = shares[:, chosen]
            solved = np.linalg.lstsq(part, np.ones(len(part)), rcond=None)[0]
            if (solved < 0).any():
                continue
            rates = [0.0] * shares.shape[1]
            for column, rate in zip(chosen, solved.tolist(), strict=True):
                rates[column] = rate
            error = float(((part @ solved - 1) ** 2).sum())
            if best is None or error < best[0]:
                best = error, tuple(rates)
    assert best is not None
    return best[1]


def _overhead(rows: Sequence[Row]) -> dict[int, float]:
    """The median of what rows have beyond their counts: a matmul library's copies, code, caches."""
    beyond: dict[int, list[float]] = {}
    for row in rows:
        beyond.setdefault(row["itemsize"], []).append(row["bytes"] - row["counted_bytes"])
    return {itemsize: float(np.median(found)) for itemsize, found in beyond.items()}
