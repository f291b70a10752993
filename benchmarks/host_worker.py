# SPDX-License-Identifier: Apache-2.0
"""Times the host's share of calls of whichever `prereg_kernels` is on the path.

`benchmarks/host.py` starts it, for one checkout and then another, and says what is measured. It
speaks as `compare_worker.py` does, and answers besides a JSON object {"parts": a cell, "calls": a
count} with the microseconds of each part of the call, the median of so many.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch

import prereg_kernels
from prereg_kernels import fused_pre_loss, pre_tap

WARM_UP = 10
ALIGNED = 16  # bytes: as the rows of a head of any usual width are
MULTIPROCESSORS = 132

# The parts of a call, and the functions that begin them, where a revision has them. What such a
# function calls is its own part's, up to the next one that begins another.
OPS = "prereg_kernels.ops"
KERNELS = ("activation", "copy", "gather", "loss", "scatter", "sums")
PARTS = {
    "arguments": (
        *(
            (f"{OPS}.{module}", name)
            for module in ("loss", "tap")
            for name in ("check_inputs", "check_spec", "token_coefficients")
        ),
    ),
    "op": ((f"{OPS}.tap", "call_gradients"), (f"{OPS}.loss", "call_gradients")),
    "chunks": ((f"{OPS}.custom_ops", "losses_and_gradients"),),
    "launches": (*((f"{OPS}.backends.triton.{module}", "launch") for module in KERNELS),),
}
REST = "autograd"


def find(path: str) -> Any:
    """A module, or a class of one; None where this revision has none of that name."""
    name, _, member = path.partition(":")
    try:
        module = import_module(name)
    except ModuleNotFoundError:
        return None
    return getattr(module, member) if member else module


class NoGPU:
    """Triton's driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def stub() -> None:
    """Triton's kernels are compiled and launched for a GPU; the launch itself does nothing.

    Values are not looked at, as on a GPU.
    """
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    def load(kernel: Any) -> None:
        kernel.__dict__["_run" if "run" in vars(CompiledKernel) else "run"] = do_nothing
        kernel.module = kernel.function = 0

    driver.set_active(NoGPU())
    CompiledKernel._init_handles = load
    CompiledKernel.__del__ = do_nothing
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    for places, function in STUBS:
        [holder] = filter(None, map(find, places))
        setattr(holder, *function)


def do_nothing(*arguments: object) -> None:
    """In place of a launch."""


# What is set in stub(), in the first of these places that a revision has: the layout changed
STUBS = (
    (
        (f"{OPS}.backends.triton.backend:TritonBackend", "prereg_kernels.rows.triton_rows"),
        ("unavailable", staticmethod(do_nothing)),
    ),
    (
        (f"{OPS}.arguments", "prereg_kernels.inputs"),
        ("_values_readable", lambda tensor: False),
    ),
)


def make_call(name: str, chunks: int, rows: int, width: int, dtype: str) -> Callable[[], object]:
    """One forward and backward pass of the paper's head, for tokens that an index selects.

    The tap's has a residual.
    """
    kind, positions = getattr(torch, dtype), rows + rows // 8

    def draw(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=kind)

    hidden, anchor, residual = (draw(positions, width) for _ in range(3))
    weights = [draw(width, width).requires_grad_() for _ in range(2)]
    biases = [draw(width).requires_grad_() for _ in range(2)]
    factor = torch.ones(())
    leaves = [hidden.requires_grad_(), *weights, *biases]
    options: dict[str, Any] = {
        "visual_index": torch.arange(rows), "backend": "triton",
        "chunk_rows": None if chunks == 1 else rows // chunks,
    }  # fmt: skip

    def fused() -> object:
        loss = fused_pre_loss(hidden, anchor, weights, biases, **options)
        return torch.autograd.grad(loss, leaves)

    def tap() -> object:
        tapped, loss = pre_tap(hidden, anchor, weights, biases, **options)
        return torch.autograd.grad([loss, tapped], leaves, [factor, residual])

    return {"fused": fused, "tap": tap}[name]


@cache
def warm_call(*cell: Any) -> Callable[[], object]:
    """The call of a cell, warm."""
    call = make_call(*cell)
    for _ in range(WARM_UP):
        call()
    return call


class Clock:
    """Time, charged to one part at a time."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys((*PARTS, REST), 0)
        self.part, self.since = REST, 0

    def turn_to(self, part: str) -> str:
        """From now on it is this part's; the one before."""
        now = time.perf_counter_ns()
        self.spent[self.part] += now - self.since
        before, self.part, self.since = self.part, part, now
        return before

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is that part's."""

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            before = self.turn_to(part)
            try:
                return function(*arguments, **options)
            finally:
                self.turn_to(before)

        return timed


def parts_of(cell: list[Any], calls: int) -> dict[str, float]:
    """Microseconds of each part of a call, medians; the clock's own time is in them."""
    call, clock = warm_call(*cell), Clock()
    before = []
    for part, places in PARTS.items():
        for module, name in places:
            holder = find(module)
            if hasattr(holder, name):
                before.append((holder, name, getattr(holder, name)))
                setattr(holder, name, clock.of(part, before[-1][2]))
    found: dict[str, list[float]] = {part: [] for part in clock.spent}
    for _ in range(calls):
        clock.spent = dict.fromkeys(clock.spent, 0)
        clock.since = time.perf_counter_ns()
        call()
        clock.turn_to(REST)
        for part, spent in clock.spent.items():
            found[part].append(1e-3 * spent)
    for module, name, function in before:
        setattr(module, name, function)
    return {part: statistics.median(times) for part, times in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    stub()
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
        question = json.loads(line)
        if isinstance(question, dict):
            print(json.dumps(parts_of(question["parts"], question["calls"])), flush=True)
            continue
        *cell, count = question
        call, times = warm_call(*cell), []
        for _ in range(count):
            begin = time.thread_time_ns()
            call()
            times.append(time.thread_time_ns() - begin)
        gc.collect(0)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
