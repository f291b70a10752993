"""Times short calls of whichever `prereg_kernels` is on the path, a batch for each line it reads.

`benchmarks/loss/call_overhead.py` starts it, for one checkout and then another; so it imports the
public function of the package, torch, and nothing of ours beside. It first says which package that
is; then each line, `BACKEND ROWS CALLS`, is answered by the nanoseconds of so many calls.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from functools import cache

import torch

import prereg_kernels
from prereg_kernels import fused_pre_loss

WIDTH = 64
WARM_UP = 20


@cache
def make_call(backend: str, rows: int) -> Callable[[], object]:
    """One forward and backward pass of the paper's head, warm."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, anchor = draw(rows, WIDTH).requires_grad_(), draw(rows, WIDTH)
    weights = [(draw(WIDTH, WIDTH) / WIDTH**0.5).requires_grad_() for _ in range(2)]
    biases = [draw(WIDTH).requires_grad_() for _ in range(2)]
    leaves = [hidden, *weights, *biases]

    def call() -> object:
        loss = fused_pre_loss(hidden, anchor, weights, biases, backend=backend)
        return torch.autograd.grad(loss, leaves)

    for _ in range(WARM_UP):
        call()
    return call


def main() -> None:
    torch.set_num_threads(1)
    gc.disable()
    print(json.dumps(prereg_kernels.__file__), flush=True)
    for line in sys.stdin:
        backend, rows, calls = line.split()
        call, times = make_call(backend, int(rows)), []
        for _ in range(int(calls)):
            begin = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - begin)
        gc.collect(0)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
