"""A read that may never end, as on a network file system whose server is gone: not waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

READ_SECONDS = 300.0
"""What a read may take: less than the 10 minutes that NCCL waits for a rank."""


def within(call: Callable[[], T]) -> T:
    """What a call returns, or raises, unless it takes longer than `READ_SECONDS`.

    Its thread is then left behind: nothing can end a read that the kernel does not.

    Raises:
        TimeoutError: it does.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    # No pool: Python waits for the threads of one before it exits
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(READ_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {READ_SECONDS:g} s")
    return results[0]
