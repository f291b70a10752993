# SPDX-License-Identifier: Apache-2.0
"""How many rows a chunk should have: `python -m benchmarks.first.chunks --out FILE`.

The tap as in a network, with a gradient from later layers, at LLaVA's size, in chunks of several
sizes, beside the six matmuls alone; with bfloat16 weights, then with float32 ones.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.common.program import Program, make_parser, run_program
from benchmarks.common.timing import Effort, Measured, warm_and_interleave
from benchmarks.loss import cases
from benchmarks.loss.cases import Case, make_tensors
from benchmarks.loss.peers import Peer, Where, peers
from benchmarks.loss.plans import FLOOR
from benchmarks.loss.work import Work, floor_of
from prereg_kernels import pre_tap

CHUNKS = (None, 18432, 9216, 6144, 4096, 2048)  # None: what the package chooses
TINY_CHUNKS = (None, 64)
EFFORT, TINY = Effort(8, 30, 5.0), Effort(2, 2, 0.0)


def in_chunks(tap: Peer, rows: int | None) -> Peer:
    """The tap with chunks of so many rows."""
    return replace(tap, make=lambda: partial(pre_tap, chunk_rows=rows))


class Chunks(Program):
    """Both dtypes of the weights; the gap to the floor is what this is about."""

    def run(self) -> None:
        is_tiny = self.options.size == "tiny"
        self.results["cases"] = []
        for case in (cases.LLAVA, cases.MASTER_WEIGHTS):
            sized = cases.tiny(case) if is_tiny else case
            self.session.attempt(case.name, partial(self.case, sized, is_tiny))
            self.save()

    def case(self, case: Case, is_tiny: bool) -> None:
        tensors = make_tensors(case, self.session.device)
        found = {p.name: p for p in peers(Where.MAIN, "torch" if is_tiny else "triton")}
        steps = {FLOOR: Measured(floor_of(case, tensors).step)}
        for rows in TINY_CHUNKS if is_tiny else CHUNKS:
            steps[f"chunks of {rows}"] = Measured(Work(in_chunks(found["tap"], rows), tensors).step)
        steps["no residual"] = Measured(Work(found["tap, no residual"], tensors).step)
        effort = TINY if is_tiny else EFFORT
        times, errors = warm_and_interleave(steps, self.session.clock, effort)
        for name, error in errors.items():
            self.session.failed(f"{case.name}, {name}", error, ours=True)
        medians = {name: statistics.median(samples) for name, samples in times.items()}
        record = {"median_ms": medians, "samples_ms": times}
        record["of_the_floor"] = {name: ms / medians[FLOOR] for name, ms in medians.items()}
        self.results["cases"].append(case.describe() | record)
        for name, ratio in record["of_the_floor"].items():
            print(f"{case.name:14} {name:18} {medians[name]:8.3f} ms {ratio:7.3f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; by the exit code, whether all of them ran."""
    return run_program(Chunks, make_parser(__doc__ or "", 40.0), arguments)


if __name__ == "__main__":
    sys.exit(main())
