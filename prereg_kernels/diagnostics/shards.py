"""What each batch gave, on disk: a finished shard counts, a partial one never."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prereg_kernels.files import write_whole

_SETTINGS = "settings.json"


class Shards:
    """A directory of safetensors files, one a batch and pass, that a run can go on from.

    Args:
        directory: made if it is not there.
        settings: what the shards depend on. Shards of other settings are never mixed in.

    Raises:
        ValueError: the directory holds shards of other settings.
        OSError: it cannot be written.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self._directory = directory
        path = directory / _SETTINGS
        asked = json.loads(json.dumps(settings))
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(k for k in {*there, *asked} if there.get(k) != asked.get(k))
            if different:
                raise ValueError(
                    f"{directory}: holds a checkup with another {', '.join(different)}; expected "
                    "the same, another --out, or --fresh"
                )
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asked, indent=1))

    def has(self, name: str) -> bool:
        """Whether that shard is there, whole."""
        try:
            with safe_open(self._path(name), framework="pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a shard, whole or not at all.

        Raises:
            OSError: it cannot be written, such as to a full disk; the message names the file.
        """
        plain = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
        path = self._path(name)
        try:
            write_whole(path, save(plain, metadata={"facts": json.dumps(facts)}))
        except OSError as error:
            raise OSError(
                f"could not write {path}: {error.strerror or error}; what was measured before is "
                "kept, run again to go on"
            ) from error

    def facts(self, name: str) -> dict[str, Any]:
        """What was written with the tensors."""
        with safe_open(self._path(name), framework="pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["facts"])
            return found

    def read(self, name: str, tensor: str) -> Tensor:
        """One tensor of a shard."""
        with safe_open(self._path(name), framework="pt") as file:
            whole: Tensor = file.get_tensor(tensor)
            return whole

    def get(self, name: str, tensor: str) -> Tensor | None:
        """One tensor of a shard, None where it has no such one."""
        with safe_open(self._path(name), framework="pt") as file:
            return file.get_tensor(tensor) if tensor in file.keys() else None  # noqa: SIM118

    def layer(self, name: str, tensor: str, layer: int) -> Tensor:
        """`tensor[layer]`; the other layers are not read."""
        with safe_open(self._path(name), framework="pt") as file:
            part: Tensor = file.get_slice(tensor)[layer : layer + 1]
            return part[0]

    @staticmethod
    def clear(directory: Path) -> None:
        """Delete the shards there, if any: a new checkup must not go on from them."""
        if (directory / _SETTINGS).exists():
            shutil.rmtree(directory)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"
