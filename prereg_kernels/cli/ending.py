# SPDX-License-Identifier: Apache-2.0
"""How a command ends: an error is a line, and so is a warning."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from prereg_kernels._util.files import printable


def fail(message: str, code: int = 2) -> NoReturn:
    """Print it on standard error, in a line, and exit."""
    print(_line(message), file=sys.stderr)
    sys.exit(code)


def _line(message: str) -> str:
    """As `prereg` prints it."""
    return f"prereg: {printable(' '.join(message.split()))}"


def warn_in_a_line(show: Callable[..., None]) -> Callable[..., None]:
    """Warnings of this package without the line of code that they come from."""

    def in_a_line(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if Path(__file__).parents[1] in Path(filename).parents:
            print(_line(str(message)), file=sys.stderr)
        else:
            show(message, category, filename, *rest)

    return in_a_line


def reader_left(lost: str = "") -> None:
    """Whoever reads has enough, as `head` does. `lost`: what that ended, where it is an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's end
    if lost:
        fail(lost)
