# SPDX-License-Identifier: Apache-2.0
"""Flags of settings, as a command line has them."""

from __future__ import annotations


def is_value(argument: str) -> bool:
    """Whether it may be the value of the flag before it: no flag, as behind an empty variable.

    A value that begins like a flag stands behind a `=`.
    """
    return not argument.startswith("--") and argument != "-h"
