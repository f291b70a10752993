# SPDX-License-Identifier: Apache-2.0
"""The C compiler with which Triton builds, at run time, what launches a kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from functools import cache

COMPILER = "C compiler"  # what its absence is told by
SOURCE = "#include <Python.h>\n"
SECONDS = 60


@cache
def missing_compiler() -> str | None:
    """Why Triton could launch nothing, in one line; None if it can. Asked once, before a launch.

    Otherwise the first backward pass would end with Triton's error.
    """
    import triton

    if triton.knobs.build.impl is not None:  # somebody else's way to build
        return None
    command = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if command is None:
        return f"no {COMPILER} was found: install gcc or clang, or set CC"
    include = sysconfig.get_paths()["include"]
    arguments = [command, "-x", "c", "-fsyntax-only", f"-I{include}", "-"]
    try:
        subprocess.run(
            arguments, input=SOURCE, capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        errors = [line for line in error.stderr.splitlines() if "error" in line]
        line = errors[0] if errors else f"exit status {error.returncode}"
        return f"the {COMPILER} {command!r} cannot compile against Python: {line}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"the {COMPILER} {command!r} does not run: {error}"
    return None
