# SPDX-License-Identifier: Apache-2.0
"""Where samples come from: a module of this folder is a format, and its Source reads it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from prereg_kernels._util.files import printable
from prereg_kernels.train.config import DataConfig

FORMATS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The formats' names."""


def open_source(data: DataConfig) -> Any:
    """The samples of a data set; with `data.streaming` it is a Stream.

    Raises:
        ValueError: an unknown format, a file that is not of it, or one that cannot be a stream.
        OSError: a file cannot be read.
    """
    if data.format not in FORMATS:
        raise ValueError(
            f"format: expected one of {', '.join(FORMATS)}; got {printable(data.format)}"
        )
    module = importlib.import_module(f"{__name__}.{data.format}")
    source = module.open_source(data)
    if data.streaming and getattr(source, "rows", None) is None:
        raise ValueError(f"streaming: format {data.format} cannot; expected false")
    return source
