# SPDX-License-Identifier: Apache-2.0
"""What studies share: a measurement in a folder of its own, its file, and a table of that."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.report import Json, write_json
from prereg_kernels._util.machine import describe_machine


def run_study(
    documentation: str | None,
    measure: Callable[..., Json],
    table: Callable[[Json], str],
    out: Path,
    **counts: int,
) -> None:
    """The command line of a study, which measures on one thread and prints a table.

    Args:
        documentation: the module's.
        measure: called with a folder and the counts; what it returns is the file's "measured".
        table: of what the file holds.
        counts: options, and what they are by default.
    """
    parser = argparse.ArgumentParser(description=(documentation or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(Path(folder), **{name: getattr(options, name) for name in counts})
        machine = describe_machine(torch.device("cpu"), None)
        write_json({"machine": machine, "measured": measured}, options.out)
    print(table(json.loads(options.out.read_text())))
