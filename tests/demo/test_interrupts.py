# SPDX-License-Identifier: Apache-2.0
"""A Ctrl-C while worker processes start: they ignore it, and the one who starts them does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from prereg_kernels.demo.runs.interrupts import sigint_ignored

SURVIVES = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('still here')"


@pytest.mark.skipif(sys.platform != "linux", reason="others drop a blocked signal that is ignored")
def test_it_waits_for_the_end() -> None:
    before, reached = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), sigint_ignored():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached and signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_a_process_that_is_started_ignores_it() -> None:
    with sigint_ignored():
        done = subprocess.run([sys.executable, "-c", SURVIVES], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "still here\n"
