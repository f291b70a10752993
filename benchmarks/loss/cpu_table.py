"""A CPU benchmark run's tables: `python -m benchmarks.loss.cpu_table FILE.json [--markdown]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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
    return rows + [(name, *(cells.get((name, size), "-") for size in sizes)) for name in names]


def memory_rows(benchmarks: list[dict[str, Any]]) -> list[Row]:
    """A header, then each implementation's peak memory and how many times less than eager's."""
    peaks = {
        b["extra_info"]["implementation"]: b["extra_info"]["peak_bytes"]
        for b in benchmarks
        if "peak_bytes" in b["extra_info"]
    }
    rows: list[Row] = [("peak memory", "MiB", "eager / this")]
    for name, peak in peaks.items():
        rows.append((name, f"{peak / 2**20:.0f}", f"{peaks['eager'] / peak:.1f}"))
    return rows


def format_table(rows: list[Row], markdown: bool) -> str:
    """The rows under the first of them, aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def format_line(line: Row) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    rule = tuple("-" * (width - 1) + ":" if i and markdown else "-" * width
                 for i, width in enumerate(widths))  # fmt: skip
    return "\n".join(map(format_line, [rows[0], rule, *rows[1:]]))


def describe(benchmarks: list[dict[str, Any]]) -> str:
    """One sentence on what was measured, where."""
    info = benchmarks[0]["extra_info"]
    changed = " with changes" if info["dirty"] else ""
    sizes = {b["extra_info"]["size"].split(" ")[0] for b in benchmarks if "peak_bytes" not in
             b["extra_info"]}  # fmt: skip
    emulated = any(b["extra_info"].get("emulated") for b in benchmarks)
    note = (
        " This CPU has no bfloat16 arithmetic, and PyTorch's emulation takes minutes at the larger "
        "sizes (-): the floor is that of float32, in which these rows run their matmuls."
    )
    return (
        f"Forward and backward, {', '.join(sorted(sizes))}, medians of interleaved rounds; the "
        "floor is the six matmuls alone. Peak memory of a step beyond its inputs and the gradient "
        f"of hidden, one thread. {info['device']}, {info['capability']}, {info['threads']} "
        f"threads, torch {info['torch']}, commit {info['commit']}{changed}."
        + (note if emulated else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    benchmarks = json.loads(options.file.read_text())["benchmarks"]
    if not benchmarks:
        parser.error(f"{options.file} holds no benchmarks")
    for rows in (time_rows(benchmarks), memory_rows(benchmarks)):
        print(format_table(rows, options.markdown), end="\n\n")
    print(describe(benchmarks))


if __name__ == "__main__":
    main()
