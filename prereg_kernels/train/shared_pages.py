# SPDX-License-Identifier: Apache-2.0
"""Memory that a process shares with the workers that it starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pages_shared() -> Iterator[None]:
    """Workers that are started meanwhile keep sharing what is there now.

    A full garbage collection writes into each object that it looks at, and so a worker's first one
    would copy the pages of all that was imported. It leaves out what is frozen.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # a stage's model and trainer refer to each other
