# SPDX-License-Identifier: Apache-2.0
"""Run a script, as a rank of torchrun on CPUs: python on_cpu_ranks.py SCRIPT.

Trainer reads a rank's optimizer state to "cpu:0", and torch knows "cpu" alone.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch


def main() -> None:
    torch.serialization.register_package(
        1, lambda _: None, lambda storage, where: storage if where == "cpu:0" else None
    )
    script = Path(sys.argv[1])
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
