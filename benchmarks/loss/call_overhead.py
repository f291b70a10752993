"""What a call costs beside its arithmetic: this checkout against another.

    python -m benchmarks.loss.call_overhead --against CHECKOUT     # about a minute and a half

Times forward and backward of `fused_pre_loss` at 1 to 64 rows of 64 features, on the torch and the
C++ rows, one thread. Both checkouts run in processes of their own, which take turns in batches of a
few milliseconds, so that whatever slows the machine down slows both. A process has a speed of its
own (where its memory lies, say), so the pairs of processes are renewed: a pair gives a ratio, the
median over its turns, and the interval is that of the pairs (t, 95%). Writes
benchmarks/results/call_overhead.json. The exit code is 1 if a backend is slower than it was: if its
ratio, the mean over the rows, has its whole interval above 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from scipy.stats import ttest_1samp

from benchmarks.common.report import RESULTS, Json, made_on, markdown_table, write_json
from prereg_kernels._util.machine import describe_machine

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("call_worker.py")
OUT = RESULTS / "call_overhead.json"
THIS, AGAINST = "this", "against"
ROWS = (1, 2, 4, 8, 16, 32, 64)
BACKENDS = ("torch", "cpp")
PAIRS, LEAST_PAIRS, TURNS = 10, 3, 40
SECONDS = 120.0  # after which no new pair starts
BATCH_NS = 4e6

Cell = tuple[str, int]  # backend, rows
Turn = dict[str, list[int]]  # nanoseconds of the calls of each checkout's batch


class Worker:
    """A process that times the package of one checkout."""

    def __init__(self, checkout: Path) -> None:
        paths = {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | paths,
        )  # fmt: skip
        self.checkout = checkout

    def read(self) -> Any:
        """The next answer.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.checkout}: no answer, see the traceback above")
        return json.loads(line)

    def check(self) -> None:
        """That the package is the checkout's.

        Raises:
            RuntimeError: it is another one.
        """
        package = Path(self.read()).resolve().parents[1]
        found = (self.checkout / "prereg_kernels").resolve().parent
        if package != found:
            raise RuntimeError(f"{self.checkout}: expected its package, found that of {package}")

    def batch(self, cell: Cell, calls: int) -> list[int]:
        """Nanoseconds of each of so many calls."""
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):  # a process that has ended does not answer either
            self.process.stdin.write(f"{cell[0]} {cell[1]} {calls}\n")
            self.process.stdin.flush()
        times: list[int] = self.read()
        return times

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.wait()


@contextmanager
def started(checkouts: Mapping[str, Path]) -> Iterator[dict[str, Worker]]:
    """A worker for each, ended with the block."""
    workers = {name: Worker(path) for name, path in checkouts.items()}
    try:
        for worker in workers.values():
            worker.check()
        yield workers
    finally:
        for worker in workers.values():
            worker.end()


def take_turns(workers: Mapping[str, Worker], cell: Cell, turns: int) -> list[Turn]:
    """Batches of all, every other turn backwards."""
    names = list(workers)
    first = [min(worker.batch(cell, 5)) for worker in workers.values()]
    calls = max(5, int(BATCH_NS / max(first)))
    found = []
    for turn in range(turns):
        order = names if turn % 2 else names[::-1]
        found.append({name: workers[name].batch(cell, calls) for name in order})
    return found


def ratio_of(turns: Sequence[Turn]) -> float:
    """This over the other: the median over the turns of the ratio of their batches' medians."""
    return statistics.median(
        statistics.median(turn[THIS]) / statistics.median(turn[AGAINST]) for turn in turns
    )


def interval(ratios: Sequence[float]) -> Json:
    """The geometric mean of the pairs' ratios, and its 95% t interval."""
    logs = [math.log(ratio) for ratio in ratios]
    bounds = ttest_1samp(logs, 0.0).confidence_interval(0.95)
    low, high = (math.exp(bound) for bound in bounds)
    return {"ratio": math.exp(statistics.mean(logs)), "low": low, "high": high}


def summarize(pairs: Mapping[Cell, Sequence[Sequence[Turn]]]) -> tuple[list[Json], Json]:
    """A record for each cell, of the turns of every pair; and {backend: its interval}."""
    records, ratios = [], {}
    for (backend, rows), several in pairs.items():
        turns = [turn for pair in several for turn in pair]
        ratios[backend, rows] = [ratio_of(pair) for pair in several]
        record: Json = {"backend": backend, "rows": rows}
        for name in (THIS, AGAINST):
            calls = [1e-3 * call for turn in turns for call in turn[name]]
            record[name] = {"min_us": min(calls), "median_us": statistics.median(calls)}
        record["ratio_of_minima"] = record[THIS]["min_us"] / record[AGAINST]["min_us"]
        records.append(record | interval(ratios[backend, rows]) | {"pairs": ratios[backend, rows]})
    overall = {}
    for backend in dict.fromkeys(backend for backend, _ in pairs):
        of_pairs = zip(*(r for cell, r in ratios.items() if cell[0] == backend), strict=True)
        overall[backend] = interval([statistics.geometric_mean(pair) for pair in of_pairs])
        minima = [r["ratio_of_minima"] for r in records if r["backend"] == backend]
        overall[backend]["ratio_of_minima"] = statistics.geometric_mean(minima)
    return records, overall


def measure(
    checkouts: Mapping[str, Path], cells: Sequence[Cell], pairs: int, turns: int
) -> dict[Cell, list[list[Turn]]]:
    """The turns of every pair of processes in every cell; fewer pairs if the time is over."""
    found: dict[Cell, list[list[Turn]]] = {cell: [] for cell in cells}
    began = time.monotonic()
    for pair in range(pairs):
        if pair >= LEAST_PAIRS and time.monotonic() - began > SECONDS:
            break
        names = list(checkouts) if pair % 2 else list(checkouts)[::-1]
        with started({name: checkouts[name] for name in names}) as workers:
            for cell in cells:
                found[cell].append(take_turns(workers, cell, turns))
    return found


def commit_of(checkout: Path) -> str | None:
    """As git describes it; None where it does not."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def table(stored: Json) -> str:
    """The calls in microseconds and their ratios; a line for each backend."""
    head = ["rows", "this: min, median (us)", "against: min, median (us)"]
    head += ["ratio", "95% interval", "of minima"]
    rows = []
    for record in stored["cells"]:
        times = (
            f"{record[n]['min_us']:.1f}, {record[n]['median_us']:.1f}" for n in (THIS, AGAINST)
        )
        cells = [f"{record['backend']}, {record['rows']}", *times, f"{record['ratio']:.3f}"]
        rows.append([*cells, *_interval(record)])
    for backend, found in stored["overall"].items():
        cells = [f"{backend}, all", "", "", f"{found['ratio']:.3f}"]
        rows.append([*cells, *_interval(found)])
    commits = f"{stored['commits'][THIS]} against {stored['commits'][AGAINST]}"
    return (
        f"{markdown_table(head, rows, left=1)}\n\n{commits}; {stored['pairs']} pairs of processes, "
        f"{stored['turns']} turns each, {stored['seconds']:.0f} s. {made_on(stored['machine'])}."
    )


def _interval(found: Json) -> tuple[str, str]:
    return f"{found['low']:.3f} to {found['high']:.3f}", f"{found['ratio_of_minima']:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and store; whether a backend is slower than it was."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="a directory with the package")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of processes, at least 2")
    parser.add_argument("--turns", type=int, default=TURNS, help="of a pair, for each number")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.pairs < 2:
        parser.error(f"--pairs {options.pairs}: an interval takes 2 at least")
    began = time.monotonic()
    checkouts = {THIS: ROOT, AGAINST: options.against.resolve()}
    cells = [(backend, rows) for backend in BACKENDS for rows in ROWS]
    measured = measure(checkouts, cells, options.pairs, options.turns)
    records, overall = summarize(measured)
    stored = {
        "machine": describe_machine(torch.device("cpu"), None),
        "commits": {name: commit_of(path) for name, path in checkouts.items()},
        "pairs": len(measured[cells[0]]),
        "turns": options.turns,
        "seconds": time.monotonic() - began,
        "cells": records,
        "overall": overall,
    }
    write_json(stored, options.out)
    print(table(stored))
    return int(any(found["low"] > 1 for found in overall.values()))


if __name__ == "__main__":
    sys.exit(main())
