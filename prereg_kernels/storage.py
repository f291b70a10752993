"""The files that keep PRe's heads beside a plain model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prereg_kernels.files import write_whole

_HEADS_FILE, _CONFIG_FILE = "pre_heads.safetensors", "pre_config.json"


def write_heads(path: Path, heads: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write heads and config into the directory `path`; each file appears whole or not at all."""
    from safetensors.torch import save

    path.mkdir(parents=True, exist_ok=True)
    heads = {name: x.detach().contiguous() for name, x in heads.items()}
    write_whole(path / _CONFIG_FILE, json.dumps(config, indent=2))
    write_whole(path / _HEADS_FILE, save(heads))


def read_heads(
    path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The heads in the directory `path`, on the CPU.

    Args:
        shapes: what they have to be. expected: the config that they have to have been trained with.

    Raises:
        FileNotFoundError: there are none at `path`.
        ValueError: they cannot be read, or do not fit: other layers, shapes or settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (path / _HEADS_FILE, path / _CONFIG_FILE):
        if not file.is_file():
            raise FileNotFoundError(f"path: expected a directory with {file.name}, got {path}")
    try:
        saved = load_file(path / _HEADS_FILE)
        config = dict(json.loads((path / _CONFIG_FILE).read_bytes()))
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} cannot be read: {error}") from None
    for name in ("layers", "depth", "activation", "loss", "normalize"):
        if config.get(name) != expected[name]:
            raise ValueError(
                f"path: the heads in {path} were trained with {name}={config.get(name)!r}, "
                f"expected {expected[name]!r}"
            )
    theirs = {name: tuple(x.shape) for name, x in saved.items()}
    if theirs != shapes:
        raise ValueError(f"path: heads do not fit: expected {shapes}, got {theirs} in {path}")
    return saved
