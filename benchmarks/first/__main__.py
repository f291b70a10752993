# SPDX-License-Identifier: Apache-2.0
"""The first minutes of a GPU: `make gpu-first`, and then `make gpu-second`.

    python -m benchmarks.first first --out DIR                  # nine minutes
    python -m benchmarks.first second --out DIR [--what qwen]   # three
    python -m benchmarks.first first --out DIR --size tiny      # a dry run on a CPU, a minute

At most eight files. After every part all of them are there, whole. The exit code is 1 if a part
failed or was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.first.parts import FIRST_SECONDS, SECOND_SECONDS, first, second
from benchmarks.first.runner import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; whether one was not well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", choices=("first", "second"))
    parser.add_argument("--out", type=Path, required=True, help="a directory")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--seconds", type=float, help="after which everything has ended")
    parser.add_argument("--what", choices=("peers", "qwen"), default="peers", help="of the second")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if options.run == "first":
        parts, seconds = first(options.size, out), FIRST_SECONDS
    else:
        parts, seconds = second(options.size, options.what), SECOND_SECONDS
    run = Run(options.run, out, options.seconds or seconds)
    return int(not run.parts(parts))


if __name__ == "__main__":
    sys.exit(main())
