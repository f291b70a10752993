# SPDX-License-Identifier: Apache-2.0
"""Reads that may never end, as on a network file system whose server is gone: not waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

READ_SECONDS = 300.0
"""What a read may take: less than the 10 minutes that NCCL waits for a rank."""


def within(calls: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """What each call returns or raises; a TimeoutError for one that takes over `READ_SECONDS`.

    One thread makes the calls in turn. Where one does not end, it is left behind, as nothing ends
    a read that the kernel does not, and another goes on with the next.
    """
    results: list[T | Exception] = []
    while len(results) < len(calls):
        results += _in_a_thread(calls[len(results) :])
    return results


def _in_a_thread(calls: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """Up to the first call that does not end."""
    results: list[T | Exception] = []

    def run() -> None:
        for call in calls:
            try:
                results.append(call())
            except Exception as error:
                results.append(error)

    # No pool: Python waits for the threads of one before it exits
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        before = len(results)
        thread.join(READ_SECONDS)
        if not thread.is_alive():
            return results
        if len(results) == before:
            return [*results[:before], TimeoutError(f"no answer within {READ_SECONDS:g} s")]
