# SPDX-License-Identifier: Apache-2.0
"""Which stages are fused, and the tiles of their matmuls: pure functions, without triton."""

from __future__ import annotations

from dataclasses import dataclass

from prereg_kernels.ops.backends.triton.config import cdiv

STAGES = ("activate", "losses", "backward_activation", "backward_scatter")


@dataclass(frozen=True)
class FusionPlan:
    """Which stages are fused: `linear_activate` and so on.

    A stage is switched on only where it was measured to beat cuBLAS and the row kernel after it: a
    fused matmul saves their passes over memory, and loses what it is slower than cuBLAS. Nothing is
    measured yet, so that all of them are off unless PREREG_FUSED asks for them.
    """

    activate: bool = False
    losses: bool = False
    backward_activation: bool = False
    backward_scatter: bool = False


EVERYTHING = FusionPlan(True, True, True, True)


@dataclass(frozen=True)
class MatmulConfig:
    """Tiles of a fused matmul (M, K) x (K, N), and how a multiprocessor works on them."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int  # buffers of [block_m, block_k] and [block_k, block_n]
    parts: int  # into which the epilogue cuts a tile's columns, to need fewer registers
    programs: int  # a multiprocessor
    max_registers: int | None  # a thread, so that as many programs fit
    flatten: bool  # load the next tile's first blocks during the epilogue
    group_m: int = 8  # row blocks that share columns of the second operand in the L2 cache

    def tiles(self, rows: int, columns: int) -> int:
        return cdiv(rows, self.block_m) * cdiv(columns, self.block_n)


# Shared memory is read least a flop in wide tiles
WIDE = MatmulConfig(128, 256, 64, 8, 3, parts=2, programs=1, max_registers=None, flatten=True)
# Two programs a multiprocessor: each one's epilogue hides behind the other's products
TWIN = MatmulConfig(128, 128, 64, 8, 3, parts=4, programs=2, max_registers=128, flatten=True)
# The losses need 180 registers for the rows of both operands, and spill in 128
SINGLE = MatmulConfig(128, 128, 64, 8, 4, parts=2, programs=1, max_registers=None, flatten=True)

NARROW_EFFICIENCY = 0.9  # an estimate: of narrow tiles at their best, against wide ones


def candidates(stage: str, capability: tuple[int, int] | None) -> tuple[MatmulConfig, ...]:
    """The configurations of a stage that compile without spills; none: it cannot be fused.

    Hopper and the data-centre Blackwells have the instructions and the shared memory for it. On
    Ampere descriptors are replaced by pointers, which takes every register and spills.
    """
    if capability is None or capability[0] not in (9, 10):
        return ()
    if stage == "losses":
        return (WIDE, SINGLE) if capability[0] == 9 else (SINGLE,)
    if stage == "backward_activation":  # it reads a tile of u too: wide ones spill
        return (TWIN,)
    return (WIDE, TWIN)


def choose_config(
    stage: str,
    rows: int,
    columns: int,
    itemsize: int,
    capability: tuple[int, int] | None,
    multiprocessors: int,
) -> MatmulConfig | None:
    """The configuration for a product of (rows, columns), or None where the stage is not fused.

    Args:
        itemsize: bytes of an element of the operands; float32 and float64 are left to cuBLAS, which
            follows PyTorch's settings for TF32.
        capability: of the NVIDIA GPU, None for others; multiprocessors: of the GPU.
    """
    if itemsize != 2:
        return None
    configs = candidates(stage, capability)
    return max(configs, key=lambda c: _efficiency(c, rows, columns, multiprocessors), default=None)


def _efficiency(config: MatmulConfig, rows: int, columns: int, multiprocessors: int) -> float:
    """The share of the GPU's products that are wanted: neither beyond an edge nor waited for."""
    slots = multiprocessors * config.programs
    waves = cdiv(config.tiles(rows, columns), slots)
    computed = waves * slots * config.block_m * config.block_n
    best = 1.0 if config.block_n == WIDE.block_n else NARROW_EFFICIENCY
    return best * rows * columns / computed
