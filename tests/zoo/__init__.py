# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of image-text types, each with batches: `sample("llama4")`.

The weights are random and the configs are transformers' own, shrunk: nothing is downloaded.
A builder of a module in this package joins the zoo by `@case(name)`.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from functools import cache

from tests.zoo.sample import CASES, Batch, Sample

__all__ = ["CASES", "Batch", "Sample", "sample"]

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("test_"):
        importlib.import_module(f"{__name__}.{_module.name}")


@cache
def _built(name: str) -> Sample:
    return CASES[name]()


def sample(name: str) -> Sample:
    """A copy of the case: the same weights and batches on every call."""
    return copy.deepcopy(_built(name))
