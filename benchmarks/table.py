"""Print the table of a benchmark run: `python benchmarks/table.py FILE.json [--markdown]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = ("size", "implementation", "median", "time / floor", "peak memory")


def rows_of(benchmarks: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each measurement, in the order of the run."""
    rows = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        peak = info.get("peak_bytes")
        rows.append(
            (
                info["size"],
                info["implementation"],
                f"{1e3 * benchmark['stats']['median']:.1f} ms",
                f"{info['ratio_to_floor']:.2f}",
                "" if peak is None else f"{peak / 2**20:.1f} MiB",
            )
        )
    return rows


def format_table(rows: list[tuple[str, ...]], markdown: bool) -> str:
    """The rows under their header; a size is named once."""
    lines = [COLUMNS]
    for previous, row in zip([None, *rows], rows, strict=False):
        same = previous is not None and previous[0] == row[0]
        lines.append(("" if same else row[0], *row[1:]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]

    def format_line(line: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    if markdown:
        rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        head = [format_line(COLUMNS), f"| {' | '.join(rule)} |"]
    else:
        head = [format_line(COLUMNS), "  ".join("-" * width for width in widths)]
    return "\n".join([*head, *(format_line(line) for line in lines[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    benchmarks = json.loads(options.file.read_text())["benchmarks"]
    if not benchmarks:
        parser.error(f"{options.file} holds no benchmarks")
    info = benchmarks[0]["extra_info"]
    print(format_table(rows_of(benchmarks), options.markdown))
    print(
        f"\n{info['device']}, {info['threads']} threads, torch {info['torch']}, "
        f"commit {info['commit']}{' with changes' if info['changed_files'] else ''}; medians of "
        "interleaved rounds, forward and backward; peak memory of a step\n"
        "beyond the inputs (so with the gradients), one thread"
    )


if __name__ == "__main__":
    main()
