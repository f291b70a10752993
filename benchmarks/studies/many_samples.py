# SPDX-License-Identifier: Apache-2.0
"""What it takes to open a large LLaVA JSON, and to read samples of it in any order.

    python -m benchmarks.studies.many_samples             # about a minute, and 0.7 GB of disk
    python -m benchmarks.studies.many_samples --table     # prints what is there

The file is made up, of as many samples as LLaVA-1.5's second stage has. Writes
benchmarks/results/many_samples.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common.report import RESULTS, made_on
from benchmarks.common.study import run_study
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sources import open_source

OUT = RESULTS / "many_samples.json"
SAMPLES, READ = 665_000, 100_000
TURNS = 3  # a question and an answer each


def write_file(path: Path, samples: int) -> None:
    """A list of samples of about 1 KB, one a line."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(samples):
            turns = [
                {"from": "human", "value": ("<image>\n" if not turn else "") + "What is it? " * 5}
                if not turn % 2
                else {"from": "gpt", "value": "It is a café by the sea. " * 8}
                for turn in range(2 * TURNS)
            ]
            record = {"id": str(number), "image": f"coco/{number}.jpg", "conversations": turns}
            text = json.dumps(record, ensure_ascii=False)
            file.write(("[\n" if not number else ",\n") + text)
        file.write("\n]\n")


def measure(folder: Path, samples: int, read: int) -> dict[str, Any]:
    """Seconds and bytes of this process's memory."""
    path, process = folder / "samples.json", psutil.Process()
    write_file(path, samples)
    before, start = process.memory_info().rss, time.perf_counter()
    source = open_source(DataConfig(str(path), "llava"))
    opened, seconds = process.memory_info().rss, time.perf_counter() - start
    order = np.random.default_rng(0).integers(0, samples, read)
    start = time.perf_counter()
    for number in order.tolist():
        assert source[number].images == [f"coco/{number}.jpg"]
    reading = time.perf_counter() - start
    return {
        "samples": samples,
        "file_bytes": path.stat().st_size,
        "open_seconds": seconds,
        "open_bytes": opened - before,
        "read": read,
        "read_seconds": reading,
        "read_bytes": process.memory_info().rss - opened,
    }


def table(results: dict[str, Any]) -> str:
    """A line for people."""
    r = results["measured"]
    return (
        f"{r['samples']:,} samples in {r['file_bytes'] / 1e6:.0f} MB: opened in "
        f"{r['open_seconds']:.0f} s with {r['open_bytes'] / 1e6:.0f} MB of memory; "
        f"{r['read'] / r['read_seconds']:,.0f} samples a second in random order, "
        f"{r['read_bytes'] / 1e6:+.0f} MB after {r['read']:,}\n{made_on(results['machine'])}"
    )


if __name__ == "__main__":
    run_study(__doc__, measure, table, OUT, samples=SAMPLES, read=READ)
