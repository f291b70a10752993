# SPDX-License-Identifier: Apache-2.0
"""What is timed: the cases of a CPU and of a GPU, and the peers in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.common.timing import Effort
from benchmarks.loss import cases
from benchmarks.loss.cases import Case
from benchmarks.loss.cpu import cpu_case
from benchmarks.loss.peers import Peer, Where, peers

FLOOR = "floor"
CPU = Effort(5, 60, 9.0)
MAIN, SIDE = Effort(10, 40, 4.0), Effort(5, 25, 2.0)  # of a GPU
TINY = Effort(2, 3, 0.0)


@dataclass(frozen=True)
class Plan:
    """A case, the benchmark that its peers belong to, and the rounds."""

    case: Case
    where: Where
    effort: Effort

    def __str__(self) -> str:
        return self.case.name

    @property
    def is_of_gpu(self) -> bool:
        return not self.where & Where.CPU

    def peers(self, tiny: bool = False) -> dict[str, Peer]:
        """By name, ours last; on the torch rows where a GPU's suite runs on a CPU."""
        backend = ("torch" if tiny else "triton") if self.is_of_gpu else None
        found = sorted(peers(self.where, backend), key=lambda peer: peer.ours)
        return {peer.name: peer for peer in found}


CPU_PLANS = tuple(
    Plan(cpu_case(8192, width, dtype), Where.CPU, CPU)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (512, 1024, 2048)
)
# The most important first; compilers may take long, so what needs two more of them comes late.
LLAVA, QWEN = Plan(cases.LLAVA, Where.MAIN, MAIN), Plan(cases.QWEN, Where.MAIN, MAIN)
REST = (
    *(Plan(case, Where.SWEEP, SIDE) for case in cases.SWEEP),
    Plan(cases.MASTER_WEIGHTS, Where.SIDE, SIDE),
    Plan(cases.SMALL_HEAD, Where.SIDE, SIDE),
    Plan(cases.LINEAR_HEAD, Where.LINEAR, SIDE),
    QWEN,
)
AUTOTUNED = Plan(cases.LLAVA_AUTOTUNED, Where.AUTOTUNED, SIDE)
GPU_PLANS = (LLAVA, *REST, AUTOTUNED)
CPU_MEMORY = Plan(cpu_case(65536, 512, torch.float32), Where.CPU, CPU)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
