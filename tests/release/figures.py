# SPDX-License-Identifier: Apache-2.0
"""Which figures are older than the code that they measure.

`python -m tests.release.figures` prints a table of benchmarks/results/: where each was measured, at
which commit, and how many commits have changed since then what it measures. Those with any are to
be measured again, or said to be older, before a release.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.release.files import ROOT, git

RESULTS = ROOT / "benchmarks" / "results"
OPS = ("csrc", "prereg_kernels/ops")
ATTACH = (*OPS, "prereg_kernels/attach")
DEMO = (*ATTACH, "prereg_kernels/demo", "prereg_kernels/checkup")
MEASURES = {
    "answers_sweep.json": DEMO,
    "call_overhead.json": OPS,
    "checkup_measures.json": ("prereg_kernels/checkup/measures",),
    "claims.json": DEMO,
    "compare_epyc.json": OPS,
    "cpu.json": OPS,
    "cpu_avx512.json": OPS,
    "cpu_epyc.json": OPS,
    "cpu_primitives.json": OPS,
    "demo.json": DEMO,
    "depth.json": DEMO,
    "estimate_cpu.json": (*ATTACH, "prereg_kernels/estimate"),
    "few_shot": DEMO,
    "fidelity.json": DEMO,
    "fp8_accuracy.json": OPS,
    "head_dtype.json": DEMO,
    "host.json": OPS,
    "host_epyc.json": OPS,
    "input_pipeline.json": ("prereg_kernels/train",),
    "many_samples.json": ("prereg_kernels/train",),
    "merging.json": DEMO,
    "photographs": DEMO,
    "same_results.json": (*DEMO, "tests/release/same_results.py"),
    "token_fraction.json": DEMO,
    "watched_gradients.json": (*ATTACH, "prereg_kernels/trainers"),
}


class Stamp(NamedTuple):
    """Where a figure comes from."""

    commit: str
    is_dirty: bool
    device: str


def stamps(value: Any) -> Iterator[Stamp]:
    """Those in a file of results, at any depth: "commit", and beside it what ran it."""
    if isinstance(value, dict):
        if isinstance(commit := value.get("commit"), str):
            device = value.get("device") or value.get("processor") or ""
            yield Stamp(commit, bool(value.get("dirty")), device)
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from stamps(each)


def stamps_of(name: str) -> list[Stamp]:
    """Those of a file, or of all files of a folder, of benchmarks/results/, each once."""
    path = RESULTS / name
    files = path.rglob("*.json") if path.is_dir() else [path]
    return sorted({stamp for file in files for stamp in stamps(json.loads(file.read_text()))})


def changes_since(commit: str, paths: tuple[str, ...]) -> int:
    """How many commits have changed these files or folders since.

    Raises:
        CalledProcessError: there is no such commit, as in a clone without the history.
    """
    return int(git("rev-list", "--count", f"{commit}..HEAD", "--", *paths)[0])


def table() -> str:
    """In Markdown, a line for each commit of each file."""
    lines = ["| results | measured at | on | commits since to what it measures |", "|-|-|-|-|"]
    for name, paths in MEASURES.items():
        found = stamps_of(name)
        if not found:
            lines.append(f"| {name} | not said | | |")
        for commit, is_dirty, device in found:
            dirty = " (dirty)" if is_dirty else ""
            lines.append(
                f"| {name} | {commit}{dirty} | {device} | {changes_since(commit, paths)} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
