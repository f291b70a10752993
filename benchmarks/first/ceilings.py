# SPDX-License-Identifier: Apache-2.0
"""What nothing can exceed: `python -m benchmarks.first.ceilings --out FILE`, and the versions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.common.program import Program, make_parser, run_program
from benchmarks.common.report import Json
from benchmarks.loss.measure import measure_ceilings
from benchmarks.loss.plans import SIDE, TINY
from prereg_kernels.ops.backends import registry


class Ceilings(Program):
    """Two rates: of a copy of 2 GiB, and of a matmul of 8192 by 8192 by 8192."""

    def run(self) -> None:
        self.results["ceilings"] = {}
        is_tiny = self.options.size == "tiny"
        device = self.session.device
        backends = {n: registry.unavailable(n, device.type) for n in registry.CLASSES}
        self.results["unavailable"] = backends
        self.save()
        effort = TINY if is_tiny else SIDE
        self.results["ceilings"] = measure_ceilings(self.session, effort, is_tiny)


def table(results: Json) -> str:
    """The two rates."""
    return "\n".join(f"{k} {v:.0f}" for k, v in results["ceilings"].items() if k.endswith("_s"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the two rates."""
    return run_program(Ceilings, make_parser(__doc__ or "", 30.0), arguments, table)


if __name__ == "__main__":
    sys.exit(main())
