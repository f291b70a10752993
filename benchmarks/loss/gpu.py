# SPDX-License-Identifier: Apache-2.0
"""The loss on a GPU: `python -m benchmarks.loss.gpu --out FILE [--quick]`.

First the device's two ceilings, then cases, each with all of its peers interleaved; at the end a
short table with a line for each performance bar. The file is written after every case, whole; a
peer that fails is recorded and the run goes on. The exit code is 1 if one of ours failed.

`--size tiny` runs the same code where there is no GPU, on problems of no importance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.common.program import Program, make_parser, parse_device
from benchmarks.common.report import Json
from benchmarks.common.timing import Effort, make_clock
from benchmarks.loss import cases
from benchmarks.loss.cases import Case
from benchmarks.loss.kernels import Buffers, time_row_kernels
from benchmarks.loss.measure import measure_ceilings, run_case, run_launches
from benchmarks.loss.peers import Peer, Where, peers
from benchmarks.loss.plans import AUTOTUNED, LLAVA, QWEN, REST, SIDE, Plan
from benchmarks.loss.report import bars, short_table
from benchmarks.loss.stages import time_stages, triton_kinds
from prereg_kernels.ops.backends.registry import choose_backend

SECONDS = 270.0  # for everything; what does not fit is skipped, and says so
STAGE_CASES = (cases.LLAVA, cases.QWEN, cases.SMALL_HEAD)
QUICK, TINY = Effort(3, 10, 1.0), Effort(2, 2, 0.0)
OURS = ("fused", "tap")  # beside the compiled peers


class LossBenchmark(Program):
    """The cases, and the peers that are timed in them."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = torch.device(options.device)
        entries = ("cases", "launches", "row_kernels", "stages", "bars")
        empty: Json = {name: [] for name in entries}
        super().__init__(options, make_clock(device), ceilings={}, **empty)
        self.tiny = options.size == "tiny"
        self.few = TINY if self.tiny else QUICK if options.quick else None
        self.side = self.few or SIDE
        self.backend = "triton" if device.type == "cuda" else "torch"
        self.compiled = not (options.quick or options.no_compile)

    def run(self) -> None:
        self.session.attempt("ceilings", self.ceilings)
        if self.options.only_compile:
            for plan in (LLAVA, AUTOTUNED, QWEN):
                self.case(plan)
            return
        self.case(LLAVA)
        self.launches([cases.LLAVA, cases.SWEEP[0]])
        self.kernels()
        for plan in REST:
            self.case(plan)
        if self.compiled:
            self.case(AUTOTUNED)

    def peers(self, where: Where) -> list[Peer]:
        found = peers(where, self.backend, self.compiled)
        if self.options.only_compile:
            return [peer for peer in found if peer.compile_seconds or peer.name in OURS]
        return found

    def ceilings(self) -> None:
        self.results["ceilings"] = measure_ceilings(self.session, self.side, self.tiny)

    def case(self, plan: Plan) -> None:
        record: dict[str, Any] = {}
        self.results["cases"].append(record)
        timed, effort = self.peers(plan.where), self.few or plan.effort
        arguments = (self.session, self.sized(plan.case), timed, effort, record)
        self.session.attempt(plan.case.name, partial(run_case, *arguments))
        self.save()
        print(f"{plan.case.name}: done after {self.results['seconds']:.0f} s", file=sys.stderr)

    def launches(self, several: Sequence[Case]) -> None:
        records, timed = self.results["launches"], self.peers(Where.LAUNCHES)
        for case in map(self.sized, several):
            arguments = (self.session, case, timed, self.side, records)
            self.session.attempt(f"launches of {case.name}", partial(run_launches, *arguments))

    def kernels(self) -> None:
        """The row kernels by themselves, and stages fused and apart."""
        for backend in dict.fromkeys((self.backend, "torch")):
            action = partial(self.row_kernels, backend)
            self.session.attempt(f"row kernels, {backend}", action, backend == self.backend)
        if self.backend == "triton":
            for case in map(self.sized, STAGE_CASES):
                self.session.attempt(f"stages of {case.name}", partial(self.stages, case))
        self.save()

    def stages(self, case: Case) -> None:
        buffers = Buffers(case, self.session.device)
        for record in time_stages(buffers, triton_kinds, self.session.clock, self.side):
            self.results["stages"].append(record)
            for kind, error in record["errors"].items():
                self.session.failed(f"stage {record['name']} of {case.name}, {kind}", error, True)

    def row_kernels(self, backend: str) -> None:
        clock, copy_rate = self.session.clock, self.results["ceilings"]["copy_gb_s"]
        rows = choose_backend(backend, self.session.device)
        buffers = Buffers(self.sized(cases.LLAVA), self.session.device)
        for record in time_row_kernels(rows, buffers, clock, self.side, copy_rate):
            self.results["row_kernels"].append(record)
            if "error" in record:
                what = f"{backend} {record['name']}"
                self.session.failed(what, record["error"], backend == self.backend)

    def sized(self, case: Case) -> Case:
        return cases.tiny(case) if self.tiny else case

    def conclusions(self) -> Json:
        measured = [case for case in self.results["cases"] if case]
        return {"cases": measured, "bars": bars(self.results | {"cases": measured})}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, SECONDS)
    parser.add_argument("--quick", action="store_true", help="few rounds, no compiled peers")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--no-compile", action="store_true", help="without the compiled peers")
    some.add_argument("--only-compile", action="store_true", help="ours and the compiled peers")
    return parse_device(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and say by the exit code whether ours all worked."""
    benchmark = LossBenchmark(parse(arguments))
    complete = benchmark.run_and_save()
    print(short_table(benchmark.results))
    return int(benchmark.session.ours_failed or not complete)


if __name__ == "__main__":
    sys.exit(main())
