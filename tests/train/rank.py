# SPDX-License-Identifier: Apache-2.0
"""A process of `prereg`, as a test wants it: `python -m tests.train.rank train ...`."""

from __future__ import annotations

import os

from prereg_kernels.cli import main
from tests.train import faults
from tests.trainers import on_cpus

if __name__ == "__main__":
    if "AS_IT_IS" not in os.environ:
        on_cpus.install()
    if "FAULTS" in os.environ:
        faults.install()
    main()
