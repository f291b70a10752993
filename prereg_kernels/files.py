"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write beside `path`, then rename: a failure leaves what was there before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, str):
            content = content.encode()
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
