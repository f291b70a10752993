# SPDX-License-Identifier: Apache-2.0
"""What an installation is asked, away from the checkout: a script beside tests/helpers.py."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import helpers
import torch

import prereg_kernels
from prereg_kernels.ops.backends import registry


def main() -> None:
    """Fails where the package is another one, or computes something else than its definition."""
    torch.set_num_threads(1)
    folder = Path(prereg_kernels.__file__).parent
    assert folder.is_relative_to(sys.prefix), f"{folder} is not of {sys.prefix}"
    problem = helpers.make_problem((2, 7), (32, 48, 24))
    runs = [name for name in registry.CLASSES if registry.unavailable(name, "cpu") is None]
    for backend in runs:
        helpers.assert_as_good_as_eager(
            lambda p, b=backend: helpers.run(prereg_kernels.fused_pre_loss, p, backend=b), problem
        )
    print(json.dumps({"version": metadata.version("prereg-kernels"), "backends": runs}))


if __name__ == "__main__":
    main()
