# SPDX-License-Identifier: Apache-2.0
"""The demo's loop is of one process."""

from __future__ import annotations

import os


def check_one_process() -> None:
    """Raise ValueError where torchrun, or what is like it, has started several of this process."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count not in ("", "0", "1"):
        raise ValueError(
            f"WORLD_SIZE: expected one process, got {count}: this loop does not divide a run over "
            "ranks; start it without torchrun (prereg demo --preset deals its runs out over GPUs "
            "by itself), or train with PReTrainer, which does"
        )
