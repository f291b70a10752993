"""The peers on this machine's CPU: each a function that does one forward and backward pass."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.common.timing import Step
from benchmarks.loss.cases import Case, Tensors
from benchmarks.loss.peers import Where, peers
from benchmarks.loss.work import Floor, Work
from prereg_kernels.ops.dtypes import operand_dtype

CPU = torch.device("cpu")
FLOOR = "floor"
PEERS = {peer.name: peer for peer in sorted(peers(Where.CPU), key=lambda peer: peer.ours)}
NAMES = (FLOOR, *PEERS)


def cpu_case(tokens: int, width: int, dtype: torch.dtype) -> Case:
    """N visual tokens, and no text, with D = M = A features."""
    name = f"N={tokens} D={width} {str(dtype).removeprefix('torch.')}"
    return Case(name, tokens, (width,) * 3, dtype, dtype, text=False)


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU only emulates products of this dtype, which takes up to 500 times longer."""
    return operand_dtype(dtype, CPU) != dtype


def make_step(name: str, case: Case, tensors: Tensors) -> Step:
    """The step of a peer, or of the floor in the dtype that this CPU is fast in.

    Its first call compiles where there is something to.
    """
    if name == FLOOR:
        dtype = operand_dtype(case.dtype, CPU)
        return Floor(replace(case, dtype=dtype, weight_dtype=dtype), tensors, fresh=True).step
    return Work(PEERS[name], tensors).training_step
