# SPDX-License-Identifier: Apache-2.0
"""Directories that a command writes into: whose they are, and one command at a time in each.

The first command that writes into a directory leaves its mark there. In a directory with a mark of
its kind a command may overwrite and delete what it writes; elsewhere it touches nothing that is
there. A lock, which the system takes back when the process ends, however it ends, keeps a second
command out. Over NFS it holds between machines unless the mount says `local_lock` or `nolock`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from prereg_kernels._util.files import printable, read_json, write_whole

MARK = ".prereg"
LOCK = ".prereg.lock"


@contextmanager
def held(
    directory: Path,
    kind: str,
    names: Sequence[str],
    is_ours: Callable[[Path], bool],
    is_checkpoint: Callable[[Path], bool],
) -> Iterator[None]:
    """Hold `directory` for a command of this kind, made and marked where it is not yet.

    Args:
        kind: "run", "experiment", "sweep" or "training".
        names: what the command writes there; a name that ends in "/" is a directory.
        is_ours: whether a directory that holds some of these names, but no mark, was written by
            version 0.1.0, which left none.
        is_checkpoint: whether a directory is one that this command deletes when the next is there.

    Raises:
        ValueError: it is somebody else's, of another kind, in use, or no place to write to. Nothing
            was touched.
    """
    check_place(directory, is_checkpoint)
    for name in names:
        path = directory / name
        if os.path.lexists(path) and path.is_dir() != name.endswith("/"):
            kinds = ("directory", "file") if name.endswith("/") else ("file", "directory")
            raise ValueError("{}: expected a {}, got a {}".format(printable(path), *kinds))
    if os.path.lexists(directory / MARK):
        found = _mark(directory)["kind"]
        if found != kind:
            raise ValueError(f"{printable(directory)}: holds a {found}; expected another --out")
    else:
        there = [name for name in names if os.path.lexists(directory / name)]
        if there and not is_ours(directory):
            raise ValueError(
                f"{printable(directory)}: {there[0].rstrip('/')} there was not written by this "
                "command, which would overwrite it; expected a directory of its own: another --out"
            )
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{printable(directory)}: in use{_by_whom(directory)}; expected one command at a time "
            "in a directory: wait for it, or use another --out"
        ) from None
    except NotImplementedError as error:  # of older versions of filelock
        raise ValueError(
            f"{printable(directory)}: expected a file system with locks, another --out: {error}"
        ) from None
    try:
        mark = {"kind": kind, "pid": os.getpid(), "host": socket.gethostname()}
        write_whole(directory / MARK, json.dumps(mark) + "\n")
        yield
    finally:
        lock.release()


def is_marked(directory: Path, kind: str) -> bool:
    """Whether a command of this kind has written there."""
    return os.path.lexists(directory / MARK) and _mark(directory)["kind"] == kind


def check_place(directory: Path, is_checkpoint: Callable[[Path], bool]) -> None:
    """Raise ValueError where a command cannot write, or where what it writes would not last."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise ValueError(f"--out: expected a name in UTF-8, got {printable(directory)}") from None
    if os.path.lexists(directory) and not directory.is_dir():
        found = "a link that leads to none" if directory.is_symlink() else "a file"
        raise ValueError(f"{printable(directory)}: expected a directory, got {found}")
    real = Path(os.path.realpath(directory))
    for path in (real, *real.parents):
        if is_checkpoint(path):
            raise ValueError(
                f"{printable(directory)}: expected a place of its own, got one inside of the "
                f"checkpoint {printable(path)}, which goes when the next one is written"
            )


def _mark(directory: Path) -> dict[str, object]:
    values = read_json(directory / MARK)
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise ValueError(f"{printable(directory / MARK)}: expected prereg's mark, got {values!r}")
    return values


def _by_whom(directory: Path) -> str:
    try:
        mark = _mark(directory)
    except (OSError, ValueError):
        return ""
    return printable(f" by process {mark.get('pid')} on {mark.get('host')}")
