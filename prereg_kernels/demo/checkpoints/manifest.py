# SPDX-License-Identifier: Apache-2.0
"""The list of a checkpoint's files, with their sizes and digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable, read_json

MANIFEST = "prereg_manifest.json"


def write_manifest(directory: Path) -> None:
    """List all files that are in `directory` now."""
    files = {
        path.relative_to(directory).as_posix(): {
            "size": path.stat().st_size,
            "sha256": _digest(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"files": files}, indent=1)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]] | None:
    """{file: its size and sha256}, or None where there is no list, as in version 0.1.0.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    values = read_json(path)
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(facts, dict) and facts.keys() == {"size", "sha256"} for facts in files.values()
    ):
        raise ValueError(f"{printable(path)}: expected a list of files with sizes and digests")
    return files


def check_files(directory: Path, files: dict[str, dict[str, Any]], needed: set[str]) -> None:
    """Raise ValueError, naming the file, unless all are there as they were written, those that are
    needed among them."""
    if not needed <= files.keys():
        raise ValueError(f"{MANIFEST} does not list {sorted(needed - files.keys())}")
    for name, facts in files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{printable(name)} is missing")
        size = path.stat().st_size
        if size != facts["size"]:
            raise ValueError(f"{printable(name)} has {size} bytes, expected {facts['size']}")
        if _digest(path) != facts["sha256"]:
            raise ValueError(f"{printable(name)} holds other bytes than were written (its SHA-256)")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
