# SPDX-License-Identifier: Apache-2.0
"""What a run's data files held when it began: a run goes on with the same, or says what changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable, read_json, write_whole
from prereg_kernels.train.config import DataConfig

DATA_FILES = "data_files.json"
_JSON = (".json", ".jsonl")
_SUFFIXES = (*_JSON, ".parquet", ".arrow", ".tar")
_PIECE = 1 << 20


def facts_of(data: Sequence[DataConfig]) -> dict[str, dict[str, Any]]:
    """{path of a data set: {file: what it holds}}: JSON's SHA-256, and of other files and of
    streams the bytes, since those may be too many to be read twice. Of names on the hub: nothing.
    """
    return {each.path: _of(each) for each in data if Path(each.path).exists()}


def _of(data: DataConfig) -> dict[str, Any]:
    path = Path(data.path)
    found = {}
    for file in sorted(_files(path, data.split)):
        name = file.name if file == path else str(file.relative_to(path))
        is_read = file.suffix in _JSON and not data.streaming
        found[name] = _digest(file) if is_read else file.stat().st_size
    return found


def _files(path: Path, split: str) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder in {path, path / "data", path / split}:
        if folder.is_dir():
            yield from (x for x in folder.iterdir() if x.suffix in _SUFFIXES and x.is_file())


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
            if change := _change(before[path], found[path]):
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
