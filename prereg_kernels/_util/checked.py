# SPDX-License-Identifier: Apache-2.0
"""A safetensors file that says of itself whether it is what was written.

Facts about the tensors are JSON in its metadata, and so is a checksum of facts and tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_METADATA = "prereg"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def to_bytes(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """The file's content.

    Raises:
        ValueError: a tensor is of no dtype that trains.
    """
    from safetensors.torch import save

    whole = {name: x.detach().to("cpu").contiguous() for name, x in tensors.items()}
    check_dtypes(whole)
    stored = {**facts, "sha256": _checksum(whole, facts)}
    return save(whole, {"format": "pt", _METADATA: json.dumps(stored)})


def read(path: Path, names: set[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors on the CPU, and the facts: of these names, or None where there are none at all.

    Version 0.1.0 wrote no checksum.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        check_dtypes(tensors)
        if metadata.keys() <= {"format"}:
            return tensors, None
        facts = dict(json.loads(metadata[_METADATA]))
    except (SafetensorError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(repr(error)) from None
    checksum = facts.pop("sha256", None)
    if facts.keys() != names:
        raise ValueError(f"expected {sorted(names)} in its metadata, got {sorted(facts)}")
    if checksum is not None and checksum != _checksum(tensors, facts):
        raise ValueError("it holds other bytes than were saved, by its checksum")
    return tensors, facts


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all are of dtypes that train."""
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected one of {_DTYPES}, got {x.dtype}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensors, unless all numbers are finite."""
    found = [name for name, x in tensors.items() if not x.isfinite().all()]
    if found:
        raise ValueError(f"expected finite numbers, got NaN or infinity in {', '.join(found)}")


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Of the facts, and of each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
