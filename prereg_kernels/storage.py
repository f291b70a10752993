"""The file that keeps PRe's heads and settings beside a plain model.

One file, so that an interruption cannot leave the settings of one run beside the heads of another:
the settings are JSON in the metadata of the safetensors, and so is a checksum of all that is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prereg_kernels.files import printable, write_whole

PRE_DIR = "pre"
"""Where a directory that holds a model keeps PRe."""
HEADS_FILE = "pre_heads.safetensors"
_METADATA = "prereg"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
        ValueError: a head's dtype is none that heads train in.
    """
    from safetensors.torch import save

    path.mkdir(parents=True, exist_ok=True)
    heads = {name: x.detach().to("cpu").contiguous() for name, x in saved.heads.items()}
    _check_dtypes(heads)
    about: dict[str, Any] = {"config": saved.config, "passes": saved.passes}
    about["sha256"] = _checksum(heads, about)
    write_whole(path / HEADS_FILE, save(heads, {"format": "pt", _METADATA: json.dumps(about)}))


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
            about = dict(json.loads((opened.metadata() or {})[_METADATA]))
            heads = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        _check_dtypes(heads)
        checksum = about.pop("sha256", None)  # version 0.1.0 wrote none
        if about.keys() != {"config", "passes"}:
            raise ValueError(f"expected settings and a count, got {sorted(about)}")
        if checksum is not None and checksum != _checksum(heads, about):
            raise ValueError("it holds other bytes than were saved, by its checksum")
        saved = Saved(heads, dict(about["config"]), about["passes"])
        if type(saved.passes) is not int or not 0 <= saved.passes < 2**63:
            raise ValueError(f"passes: expected a count, got {saved.passes!r}")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = error if type(error) is ValueError else repr(error)
        raise ValueError(f"path: {printable(file)} cannot be read: {reason}") from None
    return saved


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
    _check_dtypes(saved.heads)
    infinite = [name for name, x in saved.heads.items() if not x.isfinite().all()]
    if infinite:
        raise ValueError(
            f"path: expected finite heads, got NaN or infinity in {', '.join(infinite)} in {path}; "
            "train on from a checkpoint before it"
        )


def _check_dtypes(heads: Mapping[str, Tensor]) -> None:
    for name, x in heads.items():
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected one of {_DTYPES}, got {x.dtype}")


def _checksum(heads: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """Of the settings, and of each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, x in sorted(heads.items()):
        digest.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
