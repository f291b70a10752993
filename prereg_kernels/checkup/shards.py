# SPDX-License-Identifier: Apache-2.0
"""What each batch gave, on disk: a finished shard counts, a partial one never."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prereg_kernels._util.files import write_whole
from prereg_kernels.checkup.fingerprint import digest

_SETTINGS = "settings.json"
_OURS = re.compile(r"[0-9a-f]{16}")
"""What a directory of shards is called: the digest of what they depend on."""


class Shards:
    """A directory of safetensors files, one a batch and pass, that a run can go on from.

    Args:
        parent: of the directory; both are made if they are not there.
        settings: what the shards depend on. Those of other settings are in other directories.

    Attributes:
        directory: named by the digest of the settings.
        changed: the settings that differ from those of the latest shards below `parent`; none
            where there are shards of these settings, or no shards at all.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, parent: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, indent=1)
        self.directory = parent / digest(text)
        self.changed: list[str] = []
        if not self.directory.exists():
            before = _latest(parent)
            wanted = json.loads(text)
            self.changed = [key for key in wanted if before and before.get(key) != wanted[key]]
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.directory / _SETTINGS, text)

    def has(self, name: str) -> bool:
        """Whether that shard is there, whole, as it was written."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return metadata.get("checksum") == _checksum(tensors, metadata.get("facts"))
        except (FileNotFoundError, SafetensorError):
            return False

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a shard, whole or not at all.

        Raises:
            OSError: it cannot be written, such as to a full disk; the message names the file.
        """
        plain = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
        path = self._path(name)
        text = json.dumps(facts)
        metadata = {"facts": text, "checksum": _checksum(plain, text)}
        try:
            write_whole(path, save(plain, metadata=metadata))
        except OSError as error:
            raise OSError(
                f"could not write {path}: {error.strerror or error}; what was measured before is "
                "kept, run again to go on"
            ) from error

    def facts(self, name: str) -> dict[str, Any]:
        """What was written with the tensors."""
        with safe_open(self._path(name), framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            return facts

    def read(self, name: str, tensor: str) -> Tensor:
        """One tensor of a shard."""
        with safe_open(self._path(name), framework="pt") as file:
            whole: Tensor = file.get_tensor(tensor)
            return whole

    def get(self, name: str, tensor: str) -> Tensor | None:
        """One tensor of a shard, None where it has no such one."""
        with safe_open(self._path(name), framework="pt") as file:
            return file.get_tensor(tensor) if tensor in file.keys() else None  # noqa: SIM118

    def starting(self, name: str, prefix: str) -> dict[str, Tensor]:
        """The tensors of a shard whose names begin with `prefix`, by the rest of their names."""
        with safe_open(self._path(name), framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}

    def layer(self, name: str, tensor: str, layer: int) -> Tensor:
        """`tensor[layer]`; the other layers are not read."""
        with safe_open(self._path(name), framework="pt") as file:
            part: Tensor = file.get_slice(tensor)[layer : layer + 1]
            return part[0]

    @staticmethod
    def clear(parent: Path) -> None:
        """Delete the shards of all settings there: a new checkup must not go on from them. What
        else is there stays."""
        for directory in _directories(parent):
            for pattern in ("*.safetensors", "*.tmp", _SETTINGS):
                for path in directory.glob(pattern):
                    path.unlink()
            with contextlib.suppress(OSError):  # something else is in it
                directory.rmdir()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def _directories(parent: Path) -> list[Path]:
    """Of shards, the latest last."""
    paths = [p for p in parent.glob(f"*/{_SETTINGS}") if _OURS.fullmatch(p.parent.name)]
    return [path.parent for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]


def _latest(parent: Path) -> dict[str, Any]:
    """The settings of the latest shards, as far as they can be read."""
    for directory in reversed(_directories(parent)):
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads((directory / _SETTINGS).read_text(encoding="utf-8"))
            if isinstance(settings, dict):
                return settings
    return {}


def _checksum(tensors: Mapping[str, Tensor], facts: str | None) -> str:
    return digest(sorted(tensors.items()), facts)
