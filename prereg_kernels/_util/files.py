"""Files that are there whole or not at all, and their names as people see them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
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


def read_json(path: Path) -> Any:
    """The values of a JSON file.

    Raises:
        ValueError: it is not JSON; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{printable(path)}: not valid JSON: {reason}") from None


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
