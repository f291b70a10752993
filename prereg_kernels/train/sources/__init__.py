"""Where samples come from: a module of this folder is a format, and its Source reads it."""

from __future__ import annotations

import importlib
import pkgutil

from prereg_kernels._util.files import printable
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.source import Source

FORMATS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The formats' names."""


def open_source(data: DataConfig) -> Source:
    """The samples of a data set.

    Raises:
        ValueError: an unknown format, or a file that is not of it.
        OSError: a file cannot be read.
    """
    if data.format not in FORMATS:
        raise ValueError(
            f"format: expected one of {', '.join(FORMATS)}; got {printable(data.format)}"
        )
    module = importlib.import_module(f"{__name__}.{data.format}")
    source: Source = module.open_source(data)
    return source
