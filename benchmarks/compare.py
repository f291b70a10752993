# SPDX-License-Identifier: Apache-2.0
"""Two revisions in one run: `make bench-compare BASE=REV`, about four minutes.

    python -m benchmarks.compare BASE     # a revision, or a directory with the package

Forward and backward of the loss and of the tap, with a residual, on one thread: short calls, which
are overhead alone, and steps of 1024 rows. Times are the processor's, which other programs do not
add to. Both checkouts run in processes of their own, which take turns in batches of a few
milliseconds, so that whatever slows the machine down slows both. A process has a speed of its own
(where its memory lies, say), so the pairs of processes are renewed: a pair gives a ratio, the
median over its turns. The interval is that of the pairs' ratios (t), wide enough that of all cells
of two equal revisions, with a probability of 95%, none is called different; so is none by less than
1%. Peak memory is that of a step in a fresh process. The exit code is 1 if this checkout is slower
or takes more memory.
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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import ttest_1samp

from benchmarks.common.report import Json, made_on, markdown_table, write_json
from benchmarks.revisions import bring_rows, checkout_of
from prereg_kernels._util.machine import describe_machine

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("compare_worker.py")
OUT = ROOT / "build" / "bench" / "compare.json"
REVISIONS = ROOT / "build" / "revisions"
THIS, BASE = "this", "base"
PAIRS, LEAST_PAIRS = 20, 5
TURNS, LEAST_TURNS = 100, 5
SECONDS, CELL_SECONDS = 180.0, 0.6  # then no new pair, and no new turn of a cell
BATCH_NS = 2e6
LEVEL = 0.95  # for all cells together
LEAST_DIFFERENCE = 0.01
PROCESSES = 3  # of each checkout, for its memory


class Cell(NamedTuple):
    """A call: the function, its backend, and the sizes of its head and its rows."""

    name: str
    backend: str
    rows: int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}, {self.backend}, {self.rows} x {self.width} {self.dtype}"


CALLS = tuple(
    Cell(name, backend, rows, 64, "float32")
    for name, backend in (("fused", "torch"), ("fused", "cpp"), ("tap", "cpp"))
    for rows in (1, 32, 1024)
)
STEPS = tuple(
    Cell(name, "auto", 1024, 512, dtype)
    for name in ("fused", "tap")
    for dtype in ("float32", "bfloat16")
)
MEMORY = tuple(cell._replace(rows=16384) for cell in STEPS)

# glibc's: a call that frees the heap's end would give it back, and fault in the next one, or not,
# by what else has ended up behind it
HEAP = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}

Turn = dict[str, list[int]]  # nanoseconds of the calls of each checkout's batch


class Program(NamedTuple):
    """What a worker runs, where it finds packages beside the environment's, and for how long."""

    file: Path
    paths: tuple[Path, ...] = ()
    batch_ns: float = BATCH_NS


CALLS_PROGRAM = Program(WORKER)


def start(
    checkout: Path, *arguments: str, program: Program = CALLS_PROGRAM
) -> subprocess.Popen[str]:
    """A worker on the package of one checkout; with arguments it answers once, of memory."""
    path = os.pathsep.join(map(str, (checkout, *program.paths)))
    paths = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    paths |= HEAP if not arguments else {}
    return subprocess.Popen(
        [sys.executable, str(program.file), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | paths,
    )  # fmt: skip


class Worker:
    """A process that times the package of one checkout."""

    def __init__(self, checkout: Path, program: Program = CALLS_PROGRAM) -> None:
        self.process, self.checkout = start(checkout, program=program), checkout
        self.program = program
        if hasattr(os, "sched_setaffinity"):
            # All on one CPU, as they take turns: another one may have a busier neighbour
            os.sched_setaffinity(self.process.pid, {max(os.sched_getaffinity(0))})

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

    def ask(self, line: str) -> Any:
        """The answer to a line."""
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):  # a process that has ended does not answer either
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        return self.read()

    def batch(self, cell: Any, calls: int) -> list[int]:
        """Nanoseconds of each of so many calls."""
        times: list[int] = self.ask(json.dumps([*cell, calls]))
        return times

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Within, another process answers, whose memory lies elsewhere."""
        assert self.ask("new") == "begun"
        yield
        assert self.ask("end") == "ended"

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.wait()


@contextmanager
def started(
    checkouts: Mapping[str, Path], program: Program = CALLS_PROGRAM
) -> Iterator[dict[str, Worker]]:
    """A worker for each, ended with the block."""
    workers = {name: Worker(path, program) for name, path in checkouts.items()}
    try:
        for worker in workers.values():
            worker.check()
        yield workers
    finally:
        for worker in workers.values():
            worker.end()


def take_turns(
    workers: Mapping[str, Worker], cell: Any, turns: int, seconds: float = CELL_SECONDS
) -> list[Turn]:
    """Batches of all, every other turn backwards; fewer turns if the time is over."""
    names = list(workers)
    first = [min(worker.batch(cell, 3)) for worker in workers.values()]
    calls = max(1, int(next(iter(workers.values())).program.batch_ns / max(first)))
    found: list[Turn] = []
    began = time.monotonic()
    for turn in range(turns):
        if turn >= LEAST_TURNS and time.monotonic() - began > seconds:
            break
        order = names if turn % 2 else names[::-1]
        found.append({name: workers[name].batch(cell, calls) for name in order})
    return found


def ratio_of(turns: Sequence[Turn]) -> float:
    """This over the other: the median over the turns of the ratio of their batches' medians."""
    return statistics.median(
        statistics.median(turn[THIS]) / statistics.median(turn[BASE]) for turn in turns
    )


def interval(ratios: Sequence[float], level: float) -> Json:
    """The geometric mean of the pairs' ratios, and its t interval."""
    logs = [math.log(ratio) for ratio in ratios]
    bounds = ttest_1samp(logs, 0.0).confidence_interval(level)
    low, high = (math.exp(bound) for bound in bounds)
    return {"ratio": math.exp(statistics.mean(logs)), "low": low, "high": high}


def verdict(found: Json, more: str, less: str) -> str:
    """What a ratio and its interval say."""
    if found["low"] > 1 and found["ratio"] > 1 + LEAST_DIFFERENCE:
        return more
    if found["high"] < 1 and found["ratio"] < 1 - LEAST_DIFFERENCE:
        return less
    return "same"


def summarize(pairs: Mapping[Any, Sequence[Sequence[Turn]]]) -> list[Json]:
    """A record for each cell, of the turns of every pair."""
    records = []
    for cell, several in pairs.items():  # named tuples, as Cell
        turns = [turn for pair in several for turn in pair]
        ratios = [ratio_of(pair) for pair in several]
        record: Json = {"cell": str(cell), **cell._asdict(), "pairs": ratios}
        for name in (THIS, BASE):
            calls = [1e-3 * call for turn in turns for call in turn[name]]
            record[name] = {"min_us": min(calls), "median_us": statistics.median(calls)}
        record |= interval(ratios, 1 - (1 - LEVEL) / len(pairs))
        records.append(record | {"verdict": verdict(record, "SLOWER", "faster")})
    return records


def peaks(checkouts: Mapping[str, Path], cell: Cell, processes: int) -> Json:
    """The peak memory of a step in each checkout: medians, their ratio, and its extremes."""
    found: dict[str, list[int]] = {name: [] for name in checkouts}
    for turn in range(processes):
        for name in checkouts if turn % 2 else [*checkouts][::-1]:
            process = start(checkouts[name], json.dumps(cell))
            answer, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{checkouts[name]}: no answer, see the traceback above")
            found[name].append(int(answer))
    medians = {name: statistics.median(values) for name, values in found.items()}
    record: Json = {"cell": str(cell), **cell._asdict(), "bytes": found}
    record |= {"ratio": medians[THIS] / medians[BASE]}
    record |= {"low": min(found[THIS]) / max(found[BASE])}
    record |= {"high": max(found[THIS]) / min(found[BASE])}
    return record | {"verdict": verdict(record, "MORE", "less")}


def measure(
    checkouts: Mapping[str, Path],
    cells: Sequence[Any],
    pairs: int,
    turns: int,
    seconds: float = SECONDS,
    cell_seconds: float = CELL_SECONDS,
    program: Program = CALLS_PROGRAM,
) -> dict[Any, list[list[Turn]]]:
    """The turns of every pair of processes in every cell; fewer pairs if the time is over."""
    found: dict[Any, list[list[Turn]]] = {cell: [] for cell in cells}
    began = time.monotonic()
    with started(checkouts, program) as workers:
        for pair in range(pairs):
            if pair >= LEAST_PAIRS and time.monotonic() - began > seconds:
                break
            for cell in cells:  # of which each has a heap that no other one has used
                with ExitStack() as stack:
                    for worker in [*workers.values()][:: 1 if pair % 2 else -1]:
                        stack.enter_context(worker.renewed())
                    found[cell].append(take_turns(workers, cell, turns, cell_seconds))
    return found


def commit_of(checkout: Path) -> str | None:
    """As git describes it; None where it does not, or describes what lies around."""
    command = ["git", "-C", str(checkout)]
    top = subprocess.run([*command, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if top.stdout.strip() != str(checkout.resolve()):
        return None
    described = [*command, "describe", "--always", "--dirty"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip() or None


def table(stored: Json) -> str:
    """The calls in microseconds, the peaks in MiB, and their ratios."""
    head = ["cell", "this: min, median (us)", "base: min, median (us)"]
    head += ["this / base", "interval", ""]
    rows = []
    for record in stored["cells"]:
        times = (f"{record[n]['min_us']:.1f}, {record[n]['median_us']:.1f}" for n in (THIS, BASE))
        rows.append([record["cell"], *times, *_ratio(record)])
    memory = []
    for record in stored["memory"]:
        mib = (f"{statistics.median(record['bytes'][n]) / 2**20:.1f}" for n in (THIS, BASE))
        memory.append([record["cell"], *mib, *_ratio(record)])
    heading = ["peak memory", "this (MiB)", "base (MiB)", "this / base", "extremes", ""]
    tables = [markdown_table(head, rows, left=1), markdown_table(heading, memory, left=1)]
    commits = f"{stored['commits'][THIS]} against {stored['commits'][BASE]}"
    last = (
        f"{commits}; {stored['pairs']} pairs of processes, {stored['turns']} turns at most, "
        f"{stored['seconds']:.0f} s. {made_on(stored['machine'])}."
    )
    return "\n\n".join([*(tables if memory else tables[:1]), last])


def _ratio(found: Json) -> tuple[str, str, str]:
    spread = f"{found['low']:.3f} to {found['high']:.3f}"
    return f"{found['ratio']:.3f}", spread, found["verdict"]


def find_base(base: str, rows: bool = True) -> tuple[Path, str | None]:
    """A directory as it is, or a revision beside this checkout; and its commit.

    rows: both checkouts have compiled rows then.
    """
    if Path(base).is_dir():
        return Path(base).resolve(), commit_of(Path(base))
    checkout = checkout_of(base, ROOT, REVISIONS)
    if rows:
        bring_rows(ROOT, checkout)
        bring_rows(checkout, ROOT)
    return checkout, checkout.name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a revision, or a directory with the package")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of processes, at least 2")
    parser.add_argument("--turns", type=int, default=TURNS, help="of a pair in a cell, at most")
    parser.add_argument("--cell-seconds", type=float, default=CELL_SECONDS, help="of these turns")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="then no new pair starts")
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.pairs < 2:
        parser.error(f"--pairs {options.pairs}: an interval takes 2 at least")
    options.cells = [cell for cell in (*CALLS, *STEPS) if options.only in str(cell)]
    if not options.cells:
        parser.error(f"--only {options.only}: in no cell's name, as {CALLS[0]}")
    try:
        options.checkout, options.commit = find_base(options.base)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and store; whether this checkout is slower, or takes more memory."""
    options = parse(arguments)
    began = time.monotonic()
    checkouts = {THIS: ROOT, BASE: options.checkout}
    times = options.seconds, options.cell_seconds
    measured = measure(checkouts, options.cells, options.pairs, options.turns, *times)
    memory = [cell for cell in MEMORY if options.only in str(cell)]
    stored = {
        "machine": describe_machine(torch.device("cpu"), None),
        "commits": {THIS: commit_of(ROOT), BASE: options.commit},
        "pairs": len(measured[options.cells[0]]),
        "turns": options.turns,
        "cells": summarize(measured),
        "memory": [peaks(checkouts, cell, PROCESSES) for cell in memory],
        "seconds": time.monotonic() - began,
    }
    write_json(stored, options.out)
    print(table(stored))
    found = [record["verdict"] for record in (*stored["cells"], *stored["memory"])]
    return int("SLOWER" in found or "MORE" in found)


if __name__ == "__main__":
    sys.exit(main())
