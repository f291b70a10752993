# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and their names as people see them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import reprlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_whole(path: Path, content: bytes | str) -> None:
    """Write beside `path`, then rename: a failure leaves what was there before.

    Of several who write at once, on any machine, each writes a file of its own; the last stands.
    A file that is replaced keeps its permissions; a new one gets those that the umask leaves.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        if isinstance(content, str):
            content = content.encode()
        with naming(path):
            temporary.write_bytes(content)
        if path.exists():
            with contextlib.suppress(OSError):  # there are file systems without permissions
                shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in here names the file, as one of a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def read_json(
    path: Path,
    like: str | None = None,
    pairs_hook: Callable[[Iterable[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The values of a JSON file in UTF-8.

    Args:
        like: what kind of object is expected, for the message; then a large file of something else
            is not read whole. None: values of any type.
        pairs_hook: makes an object of its pairs, in place of dict; its ValueErrors name the file.

    Raises:
        ValueError: it is not JSON, no such object, or too much; the message names the file.
        OSError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            if like is not None:
                while (start := file.read(1 << 20)).isspace():
                    pass
                if not start.lstrip().startswith("{"):
                    raise ValueError(f"expected {like}; got {reprlib.repr(start.strip())}")
                file.seek(0)
            return json.load(file, object_pairs_hook=pairs_hook)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error}"
    except UnicodeDecodeError as error:
        reason = f"not valid JSON: expected UTF-8 text: {error}"
    except RecursionError:
        reason = "not valid JSON: it is nested too deeply"
    except MemoryError:
        reason = "expected less than fills the memory"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{printable(path)}: {reason}")


def content_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of what the files hold, one after the other in the order of their paths."""
    content = hashlib.sha256()
    for path in sorted(paths):
        content.update(path.read_bytes())
    return content.hexdigest()


def printable(name: object) -> str:
    """A name from outside, as it can be shown on a terminal, a page or a plot.

    What would act rather than show becomes its escape, as in `repr`: control characters, marks that
    turn the direction of text, line breaks, and the bytes of a file name that is not UTF-8.
    """
    text = str(name)
    if text.isprintable():  # as pictures are, in a page: a million characters
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
