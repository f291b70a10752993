# SPDX-License-Identifier: Apache-2.0
"""Whether the demo gives today what it gave at the commits at which studies ran, bit by bit.

`python -m tests.release.same_results` runs a short demo at each of these commits and here, each
with its own compiled rows, on one machine: a minute or two a commit. If all results are equal but
times and memory, nothing of the demo's way through data, training, lessons and probes has changed a
bit since. A study's own code is not run. Writes benchmarks/results/same_results.json, and prints it
as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.report import made_on
from benchmarks.compare import REVISIONS
from benchmarks.revisions import bring_rows, checkout_of
from prereg_kernels._util.machine import describe_machine
from tests.release.figures import DEMO, MEASURES, RESULTS, stamps_of
from tests.release.files import ROOT

OUT = RESULTS / "same_results.json"
FLAGS = (
    "--preset", "scenes", "--seeds", "2", "--steps", "20", "--run.tower.steps", "20",
    "--evaluation_scenes", "48", "--probe_train_scenes", "48", "--probe_test_scenes", "48",
    "--transfer.steps", "10", "--transfer.warmup", "2", "--transfer.evaluation_scenes", "48",
    "--cost_steps", "2",
)  # fmt: skip
LEFT_OUT = ("cost", "seconds", "memory", "bytes", "ms")
"""Words in the names of what depends on the machine's load."""


def studied() -> dict[str, list[str]]:
    """{commit: the results files of studies that ran there}."""
    found: dict[str, list[str]] = {}
    for name, paths in MEASURES.items():
        if set(DEMO) <= set(paths) and name != OUT.name:
            for stamp in stamps_of(name):
                names = found.setdefault(stamp.commit, [])
                if name not in names:  # a dirty stamp is one more of the same commit
                    names.append(name)
    return found


def results_of(checkout: Path) -> dict[str, float]:
    """{path: number} of all that a short demo of this checkout reports, times and memory aside."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "prereg_kernels", "demo", *FLAGS, "--out", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{checkout}: {done.stderr[-2000:]}")
        summary = json.loads((Path(out) / "summary.json").read_text())
    return dict(numbers(summary["results"]))


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Those at any depth, by their paths."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, x in entries:
            if not any(word in str(key).split("_") for word in LEFT_OUT):
                yield from numbers(x, f"{path}/{key}")
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield path, value


def differences(before: dict[str, float], now: dict[str, float]) -> list[str]:
    """The paths of numbers that differ, or that only one has."""
    return [path for path in before.keys() | now.keys() if before.get(path) != now.get(path)]


def table(stored: dict[str, Any]) -> str:
    """In Markdown, a line for each commit."""
    lines = ["| studies | at | numbers | of them other than here |", "|-|-|--:|--:|"]
    lines += [
        f"| {', '.join(row['studies'])} | {row['commit']} | {row['numbers']} | {row['other']} |"
        for row in stored["commits"]
    ]
    return "\n".join([*lines, "", made_on(stored["machine"])])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commits", nargs="*", help="default: those of all studies of the demo")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    studies = studied()
    rows: list[dict[str, Any]] = []
    now = results_of(ROOT)
    stored = {"machine": describe_machine(torch.device("cpu"), None), "commits": rows}
    for commit in options.commits or studies:
        checkout = checkout_of(commit, ROOT, REVISIONS)
        bring_rows(checkout, ROOT)
        row: dict[str, Any] = {"studies": studies.get(commit, []), "commit": commit}
        try:
            before = results_of(checkout)
        except RuntimeError as error:  # its demo had other settings
            row |= {"numbers": 0, "other": "does not run so", "error": str(error)[-300:]}
        else:
            other = differences(before, now)
            row |= {"numbers": len(before.keys() | now.keys()), "other": len(other)}
            row |= {"examples": sorted(other)[:5]}
        rows.append(row)
        options.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored))


if __name__ == "__main__":
    main()
