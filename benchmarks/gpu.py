"""The GPU benchmark: `python -m benchmarks.gpu [--out FILE] [--quick]`.

First the device's two ceilings, then cases, each with all of its implementations interleaved; at
the end a short table with a line for each performance bar. The file is written after every case,
whole; an implementation that fails is recorded and the run goes on. The exit code is 1 if one of
ours failed.

`--device cpu --tiny` runs the same code where there is no GPU, on problems of no importance, and
keeps its file out of benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_shapes
from benchmarks.gpu_cases import Session, measure_ceilings, run_case, run_launches
from benchmarks.gpu_kernels import Buffers, time_row_kernels
from benchmarks.gpu_peers import AUTOTUNED, COMPILED, EAGER, LIGER_PACKAGE, Variant, our_variants
from benchmarks.gpu_report import bars, short_table, write_json
from benchmarks.gpu_run import run_until_stopped
from benchmarks.gpu_shapes import Case
from benchmarks.gpu_stages import time_stages, triton_kinds
from benchmarks.gpu_timing import Effort, make_clock
from prereg_kernels._util.machine import describe_machine
from prereg_kernels.ops.backends.registry import choose_backend

RESULTS = Path(__file__).parent / "results"
SECONDS = 270.0  # for everything; what does not fit is skipped, and says so
MAIN, SIDE = Effort(10, 40, 4.0), Effort(5, 25, 2.0)
STAGE_CASES = (gpu_shapes.LLAVA, gpu_shapes.QWEN, gpu_shapes.SMALL_HEAD)
QUICK, TINY = Effort(3, 10, 1.0), Effort(2, 2, 0.0)


class Benchmark:
    """A run: its results so far, and the file they are kept in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        device = torch.device(options.device)
        self.session = Session(make_clock(device), self.began + options.seconds)
        self.main = TINY if options.tiny else QUICK if options.quick else MAIN
        self.side = TINY if options.tiny else QUICK if options.quick else SIDE
        self.backend = "triton" if device.type == "cuda" else "torch"
        self.ours = our_variants(self.backend)
        self.results: dict[str, Any] = {
            "machine": describe_machine(device, options.commit),
            "options": {key: str(value) for key, value in vars(options).items()},
            "complete": False,
            "ceilings": {},
            "cases": [],
            "launches": [],
            "row_kernels": [],
            "stages": [],
            "bars": [],
            "problems": self.session.problems,
        }

    def run(self) -> None:
        """Everything, the most important first."""
        self.session.attempt("ceilings", self.ceilings)
        compiled = [] if self.options.quick or self.options.no_compile else COMPILED
        in_core = [variant for variant in self.ours if variant.name in ("fused", "tap")]
        on_the_side = [*in_core, self.ours[-1], *EAGER]
        self.case(gpu_shapes.LLAVA, [*self.ours, *EAGER, *compiled], self.main)
        self.launches([gpu_shapes.LLAVA, gpu_shapes.SWEEP[0]], in_core)
        self.kernels()
        for case in gpu_shapes.SWEEP:
            self.case(case, [*in_core, *EAGER[:2]], self.side)
        self.case(gpu_shapes.MASTER_WEIGHTS, on_the_side, self.side)
        self.case(gpu_shapes.SMALL_HEAD, on_the_side, self.side)
        liger = LIGER_PACKAGE if compiled else []
        self.case(gpu_shapes.LINEAR_HEAD, [*on_the_side, *liger], self.side)
        # compilers may take long: what needs two more of them comes late
        self.case(gpu_shapes.QWEN, [*self.ours, *EAGER, *compiled], self.main)
        if compiled:
            self.case(gpu_shapes.LLAVA_AUTOTUNED, [in_core[0], *AUTOTUNED], self.side)

    def ceilings(self) -> None:
        ceilings = measure_ceilings(self.session, self.side, self.options.tiny)
        self.results["ceilings"] = ceilings

    def case(self, case: Case, variants: Sequence[Variant], effort: Effort) -> None:
        record: dict[str, Any] = {}
        self.results["cases"].append(record)
        arguments = (self.session, self.sized(case), variants, effort, record)
        self.session.attempt(case.name, partial(run_case, *arguments))
        self.save()
        print(f"{case.name}: done after {self.results['seconds']:.0f} s", file=sys.stderr)

    def launches(self, cases: Sequence[Case], variants: Sequence[Variant]) -> None:
        records = self.results["launches"]
        for case in map(self.sized, cases):
            arguments = (self.session, case, variants, self.side, records)
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
        buffers = Buffers(self.sized(gpu_shapes.LLAVA), self.session.device)
        for record in time_row_kernels(rows, buffers, clock, self.side, copy_rate):
            self.results["row_kernels"].append(record)
            if "error" in record:
                what = f"{backend} {record['name']}"
                self.session.failed(what, record["error"], backend == self.backend)

    def sized(self, case: Case) -> Case:
        return gpu_shapes.tiny(case) if self.options.tiny else case

    def save(self, complete: bool = False) -> None:
        self.results["cases"] = [case for case in self.results["cases"] if case]
        self.results |= {
            "complete": complete,
            "seconds": time.monotonic() - self.began,
            "bars": bars(self.results),
        }
        write_json(self.results, self.options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="default: $OUT/gpu.json, else benchmarks/results/")
    parser.add_argument("--quick", action="store_true", help="few rounds, no compiled peers")
    parser.add_argument("--tiny", action="store_true", help="exercise the code, measure nothing")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled peers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which to stop")
    parser.add_argument("--commit", help="of the source, where git cannot say; -dirty at the end")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path(os.environ.get("OUT", RESULTS)) / "gpu.json"
        if options.tiny:
            parser.error("--tiny measures nothing worth keeping: expected --out FILE")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --tiny --out FILE exercises the code")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and say by the exit code whether ours all worked."""
    benchmark = Benchmark(parse(arguments))
    complete = run_until_stopped(benchmark.run, benchmark.session.problems)
    benchmark.save(complete)
    print(short_table(benchmark.results))
    return int(benchmark.session.ours_failed or not complete)


if __name__ == "__main__":
    sys.exit(main())
