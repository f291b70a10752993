# SPDX-License-Identifier: Apache-2.0
"""Where samples come from: a module of this folder is a format, and its Source reads it."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.source import json_files

FORMATS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The formats' names."""


def open_source(data: DataConfig) -> Any:
    """The samples of a data set; with `data.streaming` it is a Stream.

    Raises:
        ValueError: an unknown format, a file that is not of it, or one that cannot be a stream.
        OSError: a file cannot be read.
    """
    source = _module(data).open_source(data)
    if data.streaming and getattr(source, "rows", None) is None:
        raise ValueError(f"streaming: format {data.format} cannot; expected false")
    return source


def files_of(data: DataConfig) -> list[Path]:
    """The files on the disk that `open_source` reads the samples of. Where a format's module has
    no function of this name, it reads JSON files.

    Raises:
        ValueError: an unknown format, or files that are not of it.
        OSError: a file cannot be read.
    """
    find = getattr(_module(data), "files_of", None)
    return find(data) if find is not None else json_files(Path(data.path))


def _module(data: DataConfig) -> Any:
    if data.format not in FORMATS:
        raise ValueError(
            f"format: expected one of {', '.join(FORMATS)}; got {printable(data.format)}"
        )
    return importlib.import_module(f"{__name__}.{data.format}")
