# SPDX-License-Identifier: Apache-2.0
"""A process that waits where no handler of Python's runs, and is sent SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.launching import environment

CODE = """
import datetime, signal, sys, time
from torch.distributed import TCPStore
from prereg_kernels.train import lost_ranks

lost_ranks.PATIENCE = 2.0
signal.signal(signal.SIGTERM, lambda *_: None)
begun = time.monotonic()
is_alive = sys.argv[1] == "alive"
last = (lambda: time.monotonic()) if is_alive else (lambda: begun)
store = TCPStore("127.0.0.1", 0, 1, True, timeout=datetime.timedelta(seconds=8))
with lost_ranks.ended_without_progress(last):
    print("ready", flush=True)
    try:
        store.get("what nobody sets")
    except Exception:
        print("back")
"""


@pytest.mark.parametrize("what", ["alive", "stuck"])
def test_sigterm(tmp_path: Path, what: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, what], cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=60)
    if what == "alive":
        assert (process.returncode, said) == (0, "back\n")
    else:
        assert process.returncode == 143 and said == ""
        assert "no progress in 2 s: this rank waits for one that is gone" in error
