"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, content: bytes | str) -> None:
    """Write beside `path`, then rename: a failure leaves what was there before.

    Of several who write at once, on any machine, each writes a file of its own; the last stands.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        if isinstance(content, str):
            content = content.encode()
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
