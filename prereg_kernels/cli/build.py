# SPDX-License-Identifier: Apache-2.0
"""`prereg build`: compiles the C++ kernels against the torch that is installed."""

from __future__ import annotations

from prereg_kernels.ops.backends.cpp import unavailable
from prereg_kernels.ops.backends.cpp_build import build
from prereg_kernels.ops.backends.cpp_libraries import CSRC, build_folders, describe


def build_libraries() -> str:
    """The command. It returns what was built, where, and which variant this CPU runs.

    Raises:
        ValueError: no variant runs here after it, and why.
    """
    if not CSRC.is_dir():
        raise ValueError(f"the sources of the C++ kernels are not there: {CSRC}")
    folder, objects = build_folders()
    record = build(CSRC, folder, objects)
    lines = [f"{name} left out: {reason}" for name, reason in record["failed"].items()]
    if not record["variants"]:
        raise ValueError("; ".join(dict.fromkeys(record["failed"].values())))
    if reason := unavailable("cpu"):
        raise ValueError(reason)
    built = ", ".join(record["variants"])
    lines.append(f"{built}: built against torch {record['torch']}, in {folder}")
    lines.append(f"this CPU runs {describe()['variant']}")
    return "\n".join(lines)
