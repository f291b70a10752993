# SPDX-License-Identifier: Apache-2.0
"""After SIGTERM, a rank that waits for one that is gone ends, whatever its launcher's patience."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 50.0
"""Seconds without progress."""
_END = b"\0"  # no signal's number


@contextmanager
def ended_without_progress(last: Callable[[], float]) -> Iterator[None]:
    """Meanwhile, after SIGTERM, the process ends where nothing goes on in it.

    Launchers send SIGTERM to those that are left, too, when a rank has died. One that waits for
    a message of that one never comes back to Python, and runs no handler; a thread does.

    Args:
        last: when there was progress, by `time.monotonic`.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(told, last), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(tell, _END)  # closing it is no end: workers of a data loader hold it too
        os.close(tell)
        thread.join()
        os.close(told)


def _watch(told: int, last: Callable[[], float]) -> None:
    while (received := os.read(told, 1)) not in (b"", _END):
        if received[0] == signal.SIGTERM:
            break
    else:
        return
    arrived, is_over = time.monotonic(), threading.Event()
    threading.Thread(target=_wait, args=(told, is_over), daemon=True).start()
    while not is_over.wait(1):
        if time.monotonic() - max(arrived, last()) > PATIENCE:
            print(
                f"prereg: SIGTERM, and no progress in {PATIENCE:.0f} s: this rank waits for one "
                "that is gone",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(128 + signal.SIGTERM)


def _wait(told: int, is_over: threading.Event) -> None:
    """For the end of the pipe."""
    while os.read(told, 1) not in (b"", _END):
        pass
    is_over.set()
