# SPDX-License-Identifier: Apache-2.0
"""The peak memory of one step, beyond its inputs.

    python -m benchmarks.loss.cpu_memory NAME N D DTYPE

A process of its own for each measurement: the peak resident size never goes down again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace

import torch

from benchmarks.loss.cases import Case, Tensors, make_tensors
from benchmarks.loss.cpu import CPU, cpu_case
from benchmarks.loss.peers import PEERS, Peer
from benchmarks.loss.work import Work
from prereg_kernels.demo.runs.memory import peak_memory

ROWS = 64


def peak_bytes(peer: Peer, case: Case) -> int:
    """Peak memory of one step of a peer, measured in a fresh process; without an index."""
    dtype = str(case.dtype).removeprefix("torch.")
    arguments = [peer.name, str(case.tokens), str(case.widths[0]), dtype]
    command = [sys.executable, "-m", "benchmarks.loss.cpu_memory", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def make_quietly(case: Case) -> Tensors:
    """The case's tensors: the same few rows again and again, as to make them all leaves a peak."""
    few = make_tensors(replace(case, tokens=min(case.tokens, ROWS)), CPU)
    again = -(-case.tokens // ROWS)
    hidden, anchor = (x.detach().repeat(again, 1)[: case.tokens] for x in (few.hidden, few.anchor))
    return few._replace(hidden=hidden.requires_grad_(), anchor=anchor)


def main(name: str, tokens: str, width: str, dtype: str) -> None:
    """Print the growth of the peak: a small step warms up first, so libraries are not counted."""
    torch.set_num_threads(1)  # each thread of a matmul library brings buffers of its own
    small, case = (
        cpu_case(*size, getattr(torch, dtype)) for size in ((16, 16), (int(tokens), int(width)))
    )
    [peer] = [peer for peer in PEERS if peer.name == name]
    Work(peer, make_quietly(small)).step()
    work = Work(peer, make_quietly(case))
    before = peak_memory()
    work.step()
    print(peak_memory() - before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for argument in ("name", "tokens", "width", "dtype"):
        parser.add_argument(argument)
    main(**vars(parser.parse_args()))
