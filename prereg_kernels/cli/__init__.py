# SPDX-License-Identifier: Apache-2.0
"""The command line: a file a command."""

from prereg_kernels.cli.commands import main

__all__ = ["main"]
