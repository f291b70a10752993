"""The file that keeps PRe's heads and settings beside a plain model.

One file, so that an interruption cannot leave the settings of one run beside the heads of another:
the settings are JSON in the metadata of the safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prereg_kernels.files import write_whole

PRE_DIR = "pre"
"""Where a directory that holds a model keeps PRe."""
HEADS_FILE = "pre_heads.safetensors"
_METADATA = "prereg"


class Saved(NamedTuple):
    """What `save_heads` wrote.

    Attributes:
        heads: {name inside of `model.pre_heads`: whole parameter}, on the CPU.
        config: the fields of the PReConfig, as JSON values.
        passes: training forward passes so far.
    """

    heads: dict[str, Tensor]
    config: dict[str, Any]
    passes: int


def save_heads(path: Path, saved: Saved) -> None:
    """Write into the directory `path`; the file appears whole or not at all."""
    from safetensors.torch import save

    path.mkdir(parents=True, exist_ok=True)
    heads = {name: x.detach().contiguous() for name, x in saved.heads.items()}
    about = json.dumps({"config": saved.config, "passes": saved.passes})
    write_whole(path / HEADS_FILE, save(heads, {"format": "pt", _METADATA: about}))


def load_heads(path: str | Path) -> Saved:
    """Read the directory `path`, or `path/pre`.

    Raises:
        FileNotFoundError: neither has the file.
        ValueError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    files = [Path(path) / HEADS_FILE, Path(path) / PRE_DIR / HEADS_FILE]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"path: expected a directory with {HEADS_FILE}, or with {PRE_DIR}/{HEADS_FILE}, "
            f"got {path}"
        )
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})[_METADATA])
            heads = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return Saved(heads, dict(about["config"]), int(about["passes"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {file} cannot be read: {error!r}") from None


def check_settings(saved: Saved, config: Mapping[str, Any], path: Any) -> None:
    """Raise ValueError unless the heads were trained to do what they would do by `config`."""
    for name in ("layers", "share_head", "anchor", "level", "depth", "activation", "loss",
                 "normalize"):  # fmt: skip
        if saved.config.get(name) != config[name]:
            raise ValueError(
                f"path: the heads in {path} were trained with {name}={saved.config.get(name)!r}, "
                f"expected {config[name]!r}"
            )


def check_shapes(
    saved: Saved, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Any
) -> None:
    """Raise ValueError unless the saved heads have these shapes, which a model has by `config`."""
    theirs = {name: tuple(x.shape) for name, x in saved.heads.items()}
    if theirs != shapes:
        others = [
            f"{name}={saved.config.get(name)!r} there, {config[name]!r} here"
            for name in ("anchor", "anchor_features", "head_features")
            if saved.config.get(name) != config[name]
        ]
        raise ValueError(
            f"path: heads do not fit: expected {shapes}, got {theirs} in {path}"
            + "".join(f"; {other}" for other in others)
        )
