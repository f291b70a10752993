# SPDX-License-Identifier: Apache-2.0
"""Processes of a test that make one process group."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def enter(rank: int, port: int, count: int) -> None:
    """Begin a rank: what torch and Accelerate ask the environment for, and one thread.

    Without OMP_NUM_THREADS Accelerate gives each rank all cores. The collector, which each Trainer
    calls, leaves alone what was imported.
    """
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()


def leave() -> None:
    """End a rank, models before their process group, and without Python's finalisation.

    Where either waits for gloo's threads with the interpreter's lock, a thread that drops a tensor
    waits for the lock: torch then hangs or aborts (pytorch #190489), after all is written.
    """
    gc.collect()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def run(
    out: Path, work: Callable[[int, int, Path], None], count: int, *, start: str = "spawn"
) -> None:
    """`work(rank, port, out)` in each of so many.

    With start="forkserver" one process imports the module of `work`, and all others are its forks.
    """
    multiprocessing.set_forkserver_preload([work.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(work, (port, out), nprocs=count, start_method=start)
