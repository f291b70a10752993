# SPDX-License-Identifier: Apache-2.0
"""Names of models and data: paths, or else names on the hub."""

from __future__ import annotations

from pathlib import Path

from prereg_kernels._util.files import printable

WILDCARDS = "*?["


def check_name(setting: str, name: str | Path) -> None:
    """Raise ValueError where nothing is at what can only be meant as a path.

    The hub would be asked for it, for a minute where there is no network. A name there has one
    slash at most, as ORG/NAME. A folder ORG says nothing: it may hold what was downloaded before.
    """
    text = str(name)
    _, slash, rest = text.partition("/")
    is_path = text.startswith((".", "/", "~")) or "/" in rest or not rest
    if Path(text).exists() or not (slash and is_path):
        return
    raise ValueError(
        f"{setting}: expected a file or a folder that is there, or a name on the hub, got "
        f"{printable(text)}"
    )


def is_pattern(data: str) -> bool:
    """Whether it is a URL, or a glob of Parquet files: `datasets` looks for what is there."""
    is_glob = data.endswith(".parquet") and any(sign in data for sign in WILDCARDS)
    return "://" in data or is_glob
