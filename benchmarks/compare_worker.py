# SPDX-License-Identifier: Apache-2.0
"""Times calls of whichever `prereg_kernels` is on the path, a batch for each line it reads.

`benchmarks/compare.py` starts it, for one checkout and then another; so it imports the public
functions of the package, torch, and nothing of ours beside. It first says which package that is;
then each line, a JSON list of a cell's five values and a count, is answered by the nanoseconds of
so many calls: processor time of its one thread, which other programs do not add to. After "new" a
process of new memory answers, until "end". With a cell as the argument the program prints the
growth of the peak memory in one call.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

import prereg_kernels
from prereg_kernels import fused_pre_loss, pre_tap

WARM_UP = 10


def make_call(name: str, backend: str, rows: int, width: int, dtype: str) -> Callable[[], object]:
    """One forward and backward pass of the paper's head; the tap's with a residual."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        x = torch.empty(*shape, dtype=getattr(torch, dtype))
        return x.normal_(std=scale, generator=generator)

    hidden, anchor = draw(rows, width).requires_grad_(), draw(rows, width)
    weights = [draw(width, width, scale=width**-0.5).requires_grad_() for _ in range(2)]
    biases = [draw(width).requires_grad_() for _ in range(2)]
    leaves, residual = [hidden, *weights, *biases], draw(rows, width, scale=1 / hidden.numel())

    def fused() -> object:
        loss = fused_pre_loss(hidden, anchor, weights, biases, backend=backend)
        return torch.autograd.grad(loss, leaves)

    def tap() -> object:
        tapped, loss = pre_tap(hidden, anchor, weights, biases, backend=backend)
        return torch.autograd.grad([loss, tapped], leaves, [None, residual])

    return {"fused": fused, "tap": tap}[name]


@cache
def warm_call(*cell: object) -> Callable[[], object]:
    """The call of a cell, warm."""
    call = make_call(*cell)  # type: ignore[arg-type]
    for _ in range(WARM_UP):
        call()
    return call


def peak_bytes() -> int:
    """The largest resident size that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return 1024 * int(peak)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        name, backend, rows, width, dtype = json.loads(sys.argv[1])
        make_call(name, backend, 16, 16, dtype)()  # libraries
        call = make_call(name, backend, rows, width, dtype)
        before = peak_bytes()
        call()
        print(peak_bytes() - before)
        return
    gc.disable()
    print(json.dumps(prereg_kernels.__file__), flush=True)
    for line in iter(sys.stdin.readline, ""):
        if line == "new\n":
            if child := os.fork():  # before anything is computed: there are no threads yet
                os.waitpid(child, 0)
            print(json.dumps("ended" if child else "begun"), flush=True)
            continue
        if line == "end\n":
            return
        *cell, count = json.loads(line)
        call, times = warm_call(*cell), []
        for _ in range(count):
            begin = time.process_time_ns()
            call()
            times.append(time.process_time_ns() - begin)
        gc.collect(0)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
