# SPDX-License-Identifier: Apache-2.0
"""Five taps under a profiler: `python -m benchmarks.first.tap_profile --out FILE [--trace FILE]`.

Each kernel of a tap's forward and backward pass by name, its time, and the gap before it, in which
the device waits; what each stage takes (`prereg::NAME`); and a trace for Perfetto.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common.program import Program, make_parser, run_program
from benchmarks.common.report import Json
from benchmarks.loss import cases
from benchmarks.loss.cases import make_tensors
from benchmarks.loss.peers import Where, peers
from benchmarks.loss.work import Work
from prereg_kernels.ops.ranges import PREFIX

TAPS = 5
CALL = "tap"  # the range of one forward and backward pass
LARGEST_GAPS = 8


class Kernel(NamedTuple):
    """What ran on the device, in microseconds."""

    name: str
    begin: float
    end: float


def timeline(kernels: Iterable[Kernel]) -> Json:
    """Each kernel in order, with its time and the gap before it; the sums, and who takes most."""
    ordered = sorted(kernels, key=lambda kernel: kernel.begin)
    records: list[Json] = []
    free = ordered[0].begin if ordered else 0.0
    for kernel in ordered:
        gap = max(0.0, kernel.begin - free)
        records.append({"name": kernel.name, "us": kernel.end - kernel.begin, "gap_us": gap})
        free = max(free, kernel.end)
    by_name: dict[str, list[float]] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record["us"])
    gaps = sorted(records, key=lambda record: -record["gap_us"])[:LARGEST_GAPS]
    return {
        "busy_us": sum(record["us"] for record in records),
        "gaps_us": sum(record["gap_us"] for record in records),
        "by_name": {
            name: {"count": len(times), "mean_us": statistics.mean(times), "sum_us": sum(times)}
            for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))
        },
        "largest_gaps": [{"before": g["name"], "us": g["gap_us"]} for g in gaps if g["gap_us"]],
        "kernels": records,
    }


def kernels_of(events: Iterable[Any], on_gpu: bool) -> list[Kernel]:
    """The device's own; on a CPU the ops of torch that no other of torch's calls."""
    found = []
    for event in events:
        is_range = event.name.startswith(PREFIX) or event.name == CALL
        if on_gpu:
            is_kernel = event.device_type == DeviceType.CUDA and not is_range
        else:
            parent = "" if event.cpu_parent is None else event.cpu_parent.name
            is_kernel = event.name.startswith("aten::") and not parent.startswith("aten::")
        if is_kernel:
            span = event.time_range
            found.append(Kernel(event.name, span.start, span.end))
    return found


def stages_of(averages: Iterable[Any], on_gpu: bool) -> Json:
    """{stage: {its calls, and microseconds of the device within it}}, of all taps."""
    key = "device_time_total" if on_gpu else "cpu_time_total"
    return {
        average.key: {"count": average.count, "us": getattr(average, key)}
        for average in averages
        if average.key.startswith(PREFIX) and average.device_type == DeviceType.CPU
    }


class Profile(Program):
    """LLaVA's size, with a gradient from later layers."""

    def run(self) -> None:
        device, is_tiny = self.session.device, self.options.size == "tiny"
        on_gpu = device.type == "cuda"
        case = cases.tiny(cases.LLAVA) if is_tiny else cases.LLAVA
        [tap] = [p for p in peers(Where.LAUNCHES, "torch" if is_tiny else None) if p.residual]
        work = Work(tap, make_tensors(case, device))
        for _ in range(3):
            work.step()
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
        with profile(activities=kinds) as seen:
            for _ in range(TAPS):
                with record_function(CALL):
                    work.step()
            if on_gpu:
                torch.cuda.synchronize()
        found = timeline(kernels_of(seen.events(), on_gpu))
        self.results |= case.describe() | {"taps": TAPS, **found}
        self.results["stages"] = stages_of(seen.key_averages(), on_gpu)
        self.save()
        if self.options.trace is not None:
            beside = self.options.trace.with_name(f"partly.{self.options.trace.name}")
            seen.export_chrome_trace(str(beside))
            beside.replace(self.options.trace)


def table(results: Json) -> str:
    """The kernels by name, the stages and the gaps, of one tap."""
    if "by_name" not in results:
        return "not measured"
    taps = results["taps"]
    lines = [
        f"a tap: busy {results['busy_us'] / taps:.1f} us, gaps {results['gaps_us'] / taps:.1f}"
    ]
    for name, found in results["by_name"].items():
        count, each = found["count"] / taps, found["mean_us"]
        lines.append(
            f"  {count:5.1f} x {each:8.1f} us = {found['sum_us'] / taps:8.1f}  {name[:80]}"
        )
    for name, found in results["stages"].items():
        lines.append(
            f"  {name:36} {found['us'] / taps:8.1f} us in {found['count'] / taps:.1f} calls"
        )
    for gap in results["largest_gaps"]:
        lines.append(f"  gap of {gap['us']:8.1f} us before {gap['before'][:70]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, and print the table."""
    parser = make_parser(__doc__ or "", 40.0)
    parser.add_argument("--trace", type=Path, help="for Perfetto, *.json.gz")
    return run_program(Profile, parser, arguments, table)


if __name__ == "__main__":
    sys.exit(main())
