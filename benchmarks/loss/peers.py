# SPDX-License-Identifier: Apache-2.0
"""Who is compared: the table that the benchmarks on a CPU, on a GPU and of a step all read.

A new peer is a line of PEERS, and its loss a function here or in a file beside this one. The loss
takes `(hidden, anchor, weights, biases, *, visual_index=None)` with hidden (T, D), and returns the
mean over the rows of the index, or over all of them. Weights may be float32 where hidden is not:
the matmuls are in hidden's dtype. No peer is held back: they gather rows as fast as torch can, and
the tap alone adds a gradient from later layers, which in a network all have to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Flag, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss.liger import liger_package_loss, liger_scheme
from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap

Loss = Callable[..., Tensor]
FIRST_CALL = 30.0  # seconds allowed, where nothing is compiled
LONGEST_COMPILATION = 50.0
LONGEST_AUTOTUNING = 90.0


class Where(Flag):
    """The benchmarks, and the cases of a GPU, in which a peer is timed."""

    CPU = auto()
    MAIN = auto()  # LLaVA's and Qwen's heads
    SIDE = auto()  # float32 weights, a small head
    SWEEP = auto()  # 1k to 256k tokens
    LINEAR = auto()  # a head of one matrix
    AUTOTUNED = auto()  # LLaVA's again, beside compilers that take their time
    LAUNCHES = auto()  # what launching costs
    STEP = auto()  # hooked into a whole model's training step
    GPU = MAIN | SIDE | SWEEP | LINEAR
    EVERYWHERE = CPU | GPU | STEP


@dataclass(frozen=True)
class Peer:
    """An implementation of the loss.

    Attributes:
        name: in tables and files.
        make: gives its loss, whose first call may compile; an ImportError says why there is none.
        where: what it is timed in.
        ours: whether it takes `backend`, is held to the tests' rule, and must not fail.
        grad: whether gradients are computed, or the value alone.
        residual: whether its loss is the second of two results, as `pre_tap`'s; the first, the
            hidden states, then gets a gradient from later layers.
        compile_seconds: allowed to its compiler; 0 if it has none. `--quick` leaves compilers out.
        backend: of ours.
    """

    name: str
    make: Callable[[], Loss]
    where: Where = Where.EVERYWHERE
    ours: bool = False
    grad: bool = True
    residual: bool = False
    compile_seconds: float = 0.0
    backend: str | None = None

    def loss(self) -> Loss:
        """A new one."""
        loss = self.make()
        return partial(loss, backend=self.backend) if self.backend else loss

    @property
    def first_call_seconds(self) -> float:
        """Allowed to the first call."""
        return self.compile_seconds or FIRST_CALL


def tap_loss(*arguments: Any, **options: Any) -> Tensor:
    """The tap's scalar, where no gradient comes from later layers."""
    return pre_tap(*arguments, **options)[1]


def eager_index_select(
    hidden: Tensor,
    anchor: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    visual_index: Tensor,
) -> Tensor:
    """Eager, with rows taken by index_select: its backward is faster than that of `hidden[index]`,
    which sorts the indices, as they might repeat.
    """
    h, t = hidden.index_select(0, visual_index), anchor.index_select(0, visual_index)
    return eager_pre_loss(h, t, weights, biases)


def compiled_eager(**options: Any) -> Loss:
    """By torch.compile for exactly these shapes."""
    return torch.compile(eager_pre_loss, fullgraph=True, dynamic=False, **options)


def autotuned_eager() -> Loss:
    """Compiled, with the fastest of many kernels."""
    return compiled_eager(mode="max-autotune-no-cudagraphs")


_VALUE = Where.MAIN | Where.SIDE | Where.LINEAR
_LARGEST = Where.CPU | Where.MAIN
_TAP = Where.CPU | Where.GPU | Where.LAUNCHES
PEERS = (
    Peer("fused", lambda: fused_pre_loss, ~Where.STEP, ours=True),
    Peer("tap", lambda: pre_tap, _TAP, ours=True, residual=True),
    Peer("tap, no residual", lambda: tap_loss, _LARGEST, ours=True),
    Peer("fused, recompute", lambda: partial(fused_pre_loss, recompute=True), _LARGEST, ours=True),
    Peer("fused, torch rows", lambda: fused_pre_loss, Where.MAIN, ours=True, backend="torch"),
    Peer("forward", lambda: fused_pre_loss, _VALUE, ours=True, grad=False),
    Peer("eager", lambda: eager_pre_loss),
    Peer("eager, index_select", lambda: eager_index_select, Where.GPU),
    Peer("forward, eager", lambda: eager_index_select, _VALUE, grad=False),
    Peer("compiled eager", compiled_eager, _LARGEST, compile_seconds=LONGEST_COMPILATION),
    Peer("Liger's scheme", liger_scheme, _LARGEST, compile_seconds=LONGEST_COMPILATION),
    Peer("liger_kernel", liger_package_loss, Where.LINEAR, compile_seconds=LONGEST_COMPILATION),
    Peer(
        "compiled eager, max-autotune",
        autotuned_eager,
        Where.AUTOTUNED,
        compile_seconds=LONGEST_AUTOTUNING,
    ),
)


def peers(where: Where, backend: str | None = None, compiled: bool = True) -> list[Peer]:
    """Those of a benchmark, in their order; `backend`: of ours that have none of their own."""
    return [
        replace(peer, backend=peer.backend or backend) if peer.ours else peer
        for peer in PEERS
        if peer.where & where and (compiled or not peer.compile_seconds)
    ]
