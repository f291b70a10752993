# SPDX-License-Identifier: Apache-2.0
"""What a checkup's numbers depend on, in a few characters: another fingerprint, other numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from prereg_kernels._util import private
from prereg_kernels._util.files import content_digest
from prereg_kernels._version import __version__

_PACKAGE = Path(__file__).parents[1]
_ROW = 2**12
_LEVELS = 5  # of sums of rows of _ROW words each: any tensor becomes one word
_PIECE = 2**18
"""Words of 8 bytes that are multiplied at once: small enough to stay in a cache."""


def digest(*values: Any) -> str:
    """16 hexadecimal digits of tensors, arrays, dataclasses, containers and what `repr` tells.

    Tensors stay on their device: what leaves it is one word. A tensor without content (on the meta
    device) is unlike any other, itself included.
    """
    content = hashlib.sha256()
    for value in values:
        _feed(content.update, value)
    return content.hexdigest()[:16]


def of_model(model: nn.Module) -> dict[str, str]:
    """Of a model in memory: its weights and buffers, its config, and which adapters are active.

    It reads each weight once: a second for 2 GB on a CPU core, milliseconds on a GPU. What forward
    hooks of the user's do is not part of it.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | model.state_dict()
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(settings, dict):  # where it was loaded from does not change it
        settings = {key: x for key, x in settings.items() if key != private.NAME_OR_PATH}
    adapters = [
        (name, module.active_adapters, module.disable_adapters, getattr(module, "scaling", None))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # PEFT's layers
    ]
    attention = getattr(config, private.ATTENTION, None)
    return {
        "weights": digest(tensors),
        "config": digest(type(model).__qualname__, settings, attention, adapters),
    }


def of_files(paths: Iterable[Path | None]) -> str:
    """Of files that are too many to read: sizes and times. One that is not there counts too.

    The time of the last change of the inode is among them, since copying and unpacking set the
    other one to what they like.
    """
    content = hashlib.sha256()
    for path in paths:
        content.update(f"{_stamp(path)}\n".encode())
    return content.hexdigest()[:16]


@cache
def of_code() -> dict[str, str]:
    """Of this package's sources, and of the libraries that prepare inputs and run models."""
    import PIL
    import transformers

    libraries = [f"{x.__name__} {x.__version__}" for x in (torch, transformers, np, PIL)]
    code = content_digest(_PACKAGE.rglob("*.py"))[:16]
    return {"code": f"{__version__} {code}", "libraries": ", ".join(libraries)}


def _stamp(path: Path | None) -> tuple[int, ...] | None:
    try:
        status = None if path is None else path.stat()
    except (OSError, RuntimeError, ValueError):  # ValueError: a name with a null byte
        return None
    return status and (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _feed(put: Callable[[bytes], object], value: Any) -> None:
    """Types and lengths go in as well, so that no two values put the same bytes."""
    if isinstance(value, Tensor):
        put(f"{value.dtype} {tuple(value.shape)} ".encode())
        for plain in _plain(value):
            put(_word(plain))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        put(f"{value.dtype} {value.shape} ".encode())
        put(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        put(f"{{{len(value)} ".encode())
        for key, item in value.items():
            _feed(put, key)
            _feed(put, item)
    elif isinstance(value, (list, tuple)):
        put(f"[{len(value)} ".encode())
        for item in value:
            _feed(put, item)
    elif isinstance(value, (set, frozenset)):  # in no order of their own
        _feed(put, sorted(map(repr, value)))
    elif is_dataclass(value) and not isinstance(value, type):
        put(f"{type(value).__qualname__} ".encode())
        for field in fields(value):
            _feed(put, getattr(value, field.name))
    else:
        text = repr(value).encode(errors="surrogatepass")
        put(f"{len(text)} ".encode() + text)


def _plain(x: Tensor) -> Iterator[Tensor]:
    """The tensors inside of one of a subclass: DTensors, quantised ones."""
    if hasattr(x, "__tensor_flatten__"):
        for name in x.__tensor_flatten__()[0]:
            yield from _plain(getattr(x, name))
    else:
        yield x.detach()


def _word(x: Tensor) -> bytes:
    """8 bytes that change with any value of a tensor, and with its place.

    Sums of its words times odd random numbers, modulo 2^64: integers, so equal in any order. One
    changed word always shows; several cancel each other once in about 2^64.
    """
    if x.is_meta:
        return uuid4().bytes
    flat = x.contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    if flat.storage_offset() % 8:
        flat = flat.clone()
    rest = flat.new_zeros(8)
    rest[: flat.numel() - whole] = flat[whole:]
    words = flat[:whole].view(torch.int64)
    for factors in _factors(x.device):
        if words.numel() <= 1:
            break
        rows = words.numel() // _ROW * _ROW
        sums = [(piece.view(-1, _ROW) * factors).sum(dim=1) for piece in words[:rows].split(_PIECE)]
        last = words[rows:]
        words = torch.cat([*sums, (last * factors[: last.numel()]).sum(dim=0, keepdim=True)])
    return torch.cat([words, rest.view(torch.int64)]).cpu().numpy().tobytes()


@cache
def _factors(device: torch.device) -> tuple[Tensor, ...]:
    """Others at each level: else words that trade places across a row and a column would cancel."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**63), 2**63 - 1, (_LEVELS, _ROW), generator=generator)
    return tuple((numbers | 1).to(device))
