# SPDX-License-Identifier: Apache-2.0
"""Which figures are older than the code that they measure.

`python -m tests.release.figures` prints a table of benchmarks/results/: where each was measured, at
which commit, and how many files of what it measures are not as they were then. Those with any are
to be measured again, or moved to docs/history.md, before a release.
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
STUDY = (*DEMO, "benchmarks/studies/demo_run.py")
MEASURES = {
    "adapters.json": (
        *STUDY,
        "benchmarks/studies/merging.py",
        "benchmarks/studies/adapters.py",
    ),
    "checkup_measures.json": (
        "prereg_kernels/checkup/measures",
        "benchmarks/studies/checkup_measures.py",
    ),
    "claims.json": (*STUDY, "benchmarks/studies/claims.py"),
    "compare_epyc.json": OPS,
    "cpu_avx512.json": OPS,
    "deepstack.json": (
        *STUDY,
        "benchmarks/studies/merging.py",
        "benchmarks/studies/deepstack.py",
    ),
    "demo.json": DEMO,
    "depth.json": (*STUDY, "benchmarks/studies/depth.py"),
    "estimate_cpu.json": (*ATTACH, "prereg_kernels/estimate"),
    "few_shot": DEMO,
    "head_dtype.json": (*STUDY, "benchmarks/studies/head_dtype.py"),
    "host.json": OPS,
    "input_pipeline.json": ("prereg_kernels/train", "benchmarks/studies/input_pipeline.py"),
    "many_samples.json": ("prereg_kernels/train", "benchmarks/studies/many_samples.py"),
    "merging.json": (*STUDY, "benchmarks/studies/merging.py"),
    "photographs": (
        *STUDY,
        "benchmarks/studies/photographs.py",
        "benchmarks/studies/photo_scenes.py",
    ),
    "same_results.json": (*DEMO, "tests/release/same_results.py"),
    "token_fraction.json": (*STUDY, "benchmarks/studies/token_fraction.py"),
    "tuning.json": (
        *STUDY,
        "benchmarks/studies/merging.py",
        "benchmarks/studies/adapters.py",
        "benchmarks/studies/tuning.py",
    ),
    "watched_gradients.json": (
        *ATTACH,
        "prereg_kernels/trainers",
        "benchmarks/studies/watched_gradients.py",
    ),
}
COPIED = "prereg_kernels/estimate/cpu.json"
"""Of a file of results, by the measurement itself."""
HISTORY = ("answers_sweep.json", "cpu.json", "cpu_epyc.json", "fidelity.json", "fp8_accuracy.json")
"""Of earlier commits: on docs/history.md alone, which says so."""


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


def changed_since(commit: str, paths: tuple[str, ...]) -> list[str]:
    """The files below these paths that are not as they were then.

    Raises:
        CalledProcessError: there is no such commit, as in a clone without the history.
    """
    return git("diff", "--name-only", commit, "--", *paths, f":(exclude){COPIED}")


def table() -> str:
    """In Markdown, a line for each commit of each file."""
    lines = ["| results | measured at | on | of what it measures, files changed since |"]
    lines.append("|-|-|-|-|")
    for name, paths in MEASURES.items():
        for commit, is_dirty, device in stamps_of(name):
            dirty = " (dirty)" if is_dirty else ""
            lines.append(
                f"| {name} | {commit}{dirty} | {device} | {len(changed_since(commit, paths))} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
