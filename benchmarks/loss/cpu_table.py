# SPDX-License-Identifier: Apache-2.0
"""A CPU benchmark run's tables, in Markdown: `python -m benchmarks.loss.cpu_table FILE.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common.report import markdown_table

Row = tuple[str, ...]


def time_rows(benchmarks: list[dict[str, Any]]) -> list[Row]:
    """A header, the floor in ms, then time / floor: an implementation a row, a size a column."""
    timed = [b for b in benchmarks if "ratio_to_floor" in b["extra_info"]]
    cells = {}
    for benchmark in timed:
        info = benchmark["extra_info"]
        ratio = f"{info['ratio_to_floor']:.2f}"
        if info["implementation"] == "floor":
            ratio = f"{1e3 * benchmark['stats']['median']:.0f} ms"
        cells[info["implementation"], info["size"]] = ratio
    sizes = list(dict.fromkeys(size for _, size in cells))
    names = list(dict.fromkeys(name for name, _ in cells))
    rows: list[Row] = [("time / floor", *(size.split(" ", 1)[1] for size in sizes))]
    titles = {"floor": "the floor itself"}
    return rows + [
        (titles.get(name, name), *(cells.get((name, size), "-") for size in sizes))
        for name in names
    ]


def memory_rows(benchmarks: list[dict[str, Any]]) -> list[Row]:
    """A header, then each implementation's peak memory and how many times less than eager's."""
    peaks = {
        b["extra_info"]["implementation"]: b["extra_info"]["peak_bytes"]
        for b in benchmarks
        if "peak_bytes" in b["extra_info"]
    }
    rows: list[Row] = [("peak memory", "MiB", "times less than eager")]
    for name, peak in peaks.items():
        rows.append((name, f"{peak / 2**20:.0f}", f"{peaks['eager'] / peak:.1f}"))
    return rows


def describe(benchmarks: list[dict[str, Any]]) -> str:
    """What the tables have, where it was measured, on how many threads."""
    timed, peaks = (
        [b["extra_info"] for b in benchmarks if key in b["extra_info"]]
        for key in ("ratio_to_floor", "peak_bytes")
    )
    info = timed[0]
    changed = " with changes" if info["dirty"] else ""
    times = ", ".join(sorted({each["size"].split(" ")[0] for each in timed}))
    memory = ", ".join(sorted({each["size"] for each in peaks}))
    note = ""
    if any(each.get("emulated") for each in timed):
        note = (
            " This CPU has no bfloat16 arithmetic, and PyTorch's emulation takes minutes at the "
            "larger sizes (-): the floor is that of float32, in which these rows run their matmuls."
        )
    return (
        f"Times: forward and backward, {times}, {info['threads']} "
        f"threads, medians of interleaved rounds. Memory: {memory}, one thread, the peak of a step "
        f"beyond its inputs and the gradient of the hidden states. {info['device']}, "
        f"{info['capability']}, torch {info['torch']}, commit {info['commit']}{changed}."
        f"{note}"
    )


def format_tables(benchmarks: list[dict[str, Any]]) -> str:
    """The tables, and the sentence under them."""
    tables = (
        markdown_table(head, rows, left=1)
        for head, *rows in (time_rows(benchmarks), memory_rows(benchmarks))
    )
    return "\n\n".join([*tables, describe(benchmarks)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    benchmarks = json.loads(options.file.read_text())["benchmarks"]
    if not benchmarks:
        parser.error(f"{options.file} holds no benchmarks")
    print(format_tables(benchmarks))


if __name__ == "__main__":
    main()
