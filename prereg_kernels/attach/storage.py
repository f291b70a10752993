# SPDX-License-Identifier: Apache-2.0
"""The file that keeps PRe's heads and settings beside a plain model.

There is one file, so that an interruption cannot leave the settings of one run beside the heads of
another. The safetensors file holds the settings as JSON in its metadata, with a checksum of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prereg_kernels._util import checked
from prereg_kernels._util.files import printable, write_whole

PRE_DIR = "pre"
"""Where a directory that holds a model keeps PRe."""
HEADS_FILE = "pre_heads.safetensors"


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
    """Write into the directory `path`; the file appears whole or not at all.

    Raises:
        ValueError: heads cannot train in a head's dtype.
    """
    path.mkdir(parents=True, exist_ok=True)
    facts = {"config": saved.config, "passes": saved.passes}
    write_whole(path / HEADS_FILE, checked.to_bytes(saved.heads, facts))


def load_heads(path: str | Path) -> Saved:
    """Read the directory `path`, or `path/pre`.

    Raises:
        FileNotFoundError: neither directory has the file.
        ValueError: the file cannot be read.
    """
    files = [Path(path) / HEADS_FILE, Path(path) / PRE_DIR / HEADS_FILE]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"path: expected a directory with {HEADS_FILE}, or with {PRE_DIR}/{HEADS_FILE}, "
            f"got {path}"
        )
    try:
        heads, facts = checked.read(file, {"config", "passes"})
        if facts is None or not isinstance(facts["config"], dict):
            raise ValueError("it has no settings of PRe")
        passes = facts["passes"]
        if type(passes) is not int or not 0 <= passes < 2**63:
            raise ValueError(f"passes: expected a count, got {passes!r}")
    except ValueError as error:
        raise ValueError(f"path: {printable(file)} cannot be read: {error}") from None
    return Saved(heads, facts["config"], passes)


def check_settings(saved: Saved, config: Mapping[str, Any], path: Any) -> None:
    """Raise ValueError unless the heads were trained for what `config` would use them for."""
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
    """Raise ValueError unless the saved heads are finite numbers of these shapes, which a model has
    by `config`."""
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
    try:
        checked.check_dtypes(saved.heads)
        checked.check_finite(saved.heads)
    except ValueError as error:
        raise ValueError(f"path: {printable(path)}: {error}") from None
