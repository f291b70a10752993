# SPDX-License-Identifier: Apache-2.0
"""What a run's data files held when it began: a run goes on with the same, or says what changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable, read_json, write_whole
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.names import WILDCARDS
from prereg_kernels.train.sources import files_of

DATA_FILES = "data_files.json"
_JSON = (".json", ".jsonl")
_PIECE = 1 << 20


def facts_of(data: Sequence[DataConfig]) -> dict[str, dict[str, Any]]:
    """{path of data: {file that is read: what it holds}}: JSON's SHA-256, and of other files and of
    streams the bytes, since those may be too many to be read twice. Of what is elsewhere: nothing.
    """
    found: dict[str, dict[str, Any]] = {}
    # A path may come several times, with other splits: a SHA-256 is over a stream's size
    for each in sorted(data, key=lambda each: not each.streaming):
        facts = _of(each)
        if facts or Path(each.path).exists():
            found.setdefault(each.path, {}).update(facts)
    return found


def _of(data: DataConfig) -> dict[str, Any]:
    try:
        files = files_of(data)
    except (OSError, ValueError):  # the source says it, if it is to be opened
        return {}
    root, found = _root(data.path), {}
    for file in sorted(file for file in files if file.is_file()):
        is_read = file.suffix in _JSON and not data.streaming
        found[os.path.relpath(file, root)] = _digest(file) if is_read else file.stat().st_size
    return found


def _root(path: str) -> Path:
    """The folder that its files are named from. A glob's has no wildcard."""
    root = Path(path.removeprefix("file://"))
    if not root.is_dir():
        root = root.parent
        while any(sign in str(root) for sign in WILDCARDS):
            root = root.parent
    return root


def _digest(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            content.update(piece)
    return content.hexdigest()


def check_data(out: Path, data: Sequence[DataConfig], *, is_new: bool) -> None:
    """Write down what the files hold, or see that it is what an earlier start has found.

    Args:
        is_new: whether there was none.

    Raises:
        ValueError: a file was changed, has gone or has come.
    """
    found, written = facts_of(data), out / DATA_FILES
    if not is_new and written.exists():
        before = read_json(written, "an object of data files")
        for path in before.keys() & found.keys():
            # Where there was no file, nothing has been read
            if before[path] and (change := _change(before[path], found[path])):
                raise ValueError(
                    f"{printable(out)}: holds a run on other data: {printable(path)}: {change}; "
                    "expected the same, another --out, or --fresh to begin anew"
                )
        found = {**before, **found}
    write_whole(written, json.dumps(found, indent=1) + "\n")


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            what = "is gone" if name not in now else "is new" if name not in before else "changed"
            return f"{printable(name)} {what}"
    return ""
