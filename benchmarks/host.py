# SPDX-License-Identifier: Apache-2.0
"""The host's time for a call, against another revision in one run: `make bench-host BASE=REV`.

    PYTHONPATH=.triton/3.9.0:. python -m benchmarks.host BASE     # a revision, or a directory

Forward and backward of the loss and of the tap, with a residual, N = 576 tokens by an index, in one
chunk and in several. Triton's kernels are compiled for a GPU that is not there, and found and
launched as ever; but the launch itself does nothing. torch's own operators run on the CPU, on rows
of a few features: they take about what they take to be launched. Both checkouts take turns as in
`benchmarks/compare.py`. Of a batch the fastest call counts, since other calls find the caches full
of another process. Times are the processor's for one thread; those of the parts of a call are
medians by the clock, with what the clock takes itself, from 1 to 2 us a part and call of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common.report import Json, made_on, markdown_table, write_json
from benchmarks.compare import (
    BASE,
    CELL_SECONDS,
    ROOT,
    THIS,
    Program,
    Turn,
    commit_of,
    find_base,
    measure,
    started,
    summarize,
)
from prereg_kernels._util.machine import describe_machine

WORKER = Path(__file__).with_name("host_worker.py")
OUT = ROOT / "build" / "bench" / "host.json"
PAIRS, TURNS, SECONDS = 12, 10, 100.0
BATCH_NS = 2e7  # the first calls of a batch find the other process in the caches
PARTS_CALLS, PARTS_TURNS = 100, 5
TOKENS = 576


class HostCell(NamedTuple):
    """A call: the function, its chunks, its tokens, and the width of its head."""

    name: str
    chunks: int
    rows: int
    width: int
    dtype: str

    def __str__(self) -> str:
        chunks = "1 chunk" if self.chunks == 1 else f"{self.chunks} chunks"
        return f"{self.name}, {self.rows} tokens, {chunks}, {self.dtype}"


CELLS = (
    *(HostCell("tap", chunks, TOKENS, 4, "float32") for chunks in (1, 2, 4)),
    HostCell("fused", 1, TOKENS, 4, "float32"),
    HostCell("tap", 1, TOKENS, 8, "bfloat16"),
)


def parts_of(
    checkouts: Mapping[str, Path], cells: Sequence[HostCell], program: Program
) -> dict[HostCell, Json]:
    """Microseconds of each part of each cell's call, in each checkout: medians over turns."""
    found: dict[HostCell, Json] = {}
    with started(checkouts, program) as workers:
        for cell in cells:
            question = json.dumps({"parts": cell, "calls": PARTS_CALLS})
            turns = [
                {name: workers[name].ask(question) for name in workers} for _ in range(PARTS_TURNS)
            ]
            found[cell] = {
                name: {p: statistics.median(t[name][p] for t in turns) for p in turns[0][name]}
                for name in workers
            }
    return found


def fastest(pairs: Sequence[Sequence[Turn]]) -> list[list[Turn]]:
    """The turns with one call a batch, its fastest."""
    return [[{name: [min(times)] for name, times in turn.items()} for turn in p] for p in pairs]


def table(stored: Json) -> str:
    """The calls in microseconds and their ratios, then the parts of each."""
    head = ["call", "this (us)", "base (us)", "this / base", "interval"]
    rows = [
        [
            r["cell"], f"{r[THIS]['median_us']:.0f}", f"{r[BASE]['median_us']:.0f}",
            f"{r['ratio']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}",
        ]
        for r in stored["cells"]
    ]  # fmt: skip
    parts = list(stored["cells"][0]["parts"][THIS])
    of_parts = [
        [r["cell"], *(f"{r['parts'][THIS][p]:.0f} / {r['parts'][BASE][p]:.0f}" for p in parts)]
        for r in stored["cells"]
    ]
    heading = ["of it, this / base (us)", *parts]
    commits = f"{stored['commits'][THIS]} against {stored['commits'][BASE]}"
    last = f"{commits}; {stored['pairs']} pairs of processes, Triton {stored['triton']}, "
    last += f"{stored['seconds']:.0f} s. {made_on(stored['machine'])}."
    tables = markdown_table(head, rows, left=1), markdown_table(heading, of_parts, left=1)
    return "\n\n".join([*tables, last])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a revision, or a directory with the package")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of processes, at least 2")
    parser.add_argument("--turns", type=int, default=TURNS, help="of a pair in a cell, at most")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="then no new pair starts")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.pairs < 2:
        parser.error(f"--pairs {options.pairs}: an interval takes 2 at least")
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        parser.error("Triton: expected on PYTHONPATH, as PYTHONPATH=.triton/3.9.0:.")
    options.program = Program(WORKER, (Path(triton.origin).resolve().parents[1],), BATCH_NS)
    try:
        options.checkout, options.commit = find_base(options.base, rows=False)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and store."""
    options = parse(arguments)
    import triton  # which is there: `parse` has looked

    began = time.monotonic()
    checkouts = {THIS: ROOT, BASE: options.checkout}
    measured = measure(
        checkouts, CELLS, options.pairs, options.turns, options.seconds, CELL_SECONDS,
        options.program,
    )  # fmt: skip
    parts = parts_of(checkouts, CELLS, options.program)
    records = summarize({cell: fastest(pairs) for cell, pairs in measured.items()})
    stored = {
        "machine": describe_machine(torch.device("cpu"), None),
        "triton": triton.__version__,
        "commits": {THIS: commit_of(ROOT), BASE: options.commit},
        "pairs": len(measured[CELLS[0]]),
        "turns": options.turns,
        "cells": [r | {"parts": parts[c]} for r, c in zip(records, CELLS, strict=True)],
        "seconds": time.monotonic() - began,
    }
    write_json(stored, options.out)
    print(table(stored))
    return 0


if __name__ == "__main__":
    sys.exit(main())
