# SPDX-License-Identifier: Apache-2.0
"""How long a step takes: products at an achieved rate, bytes at an achieved bandwidth, the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prereg_kernels.estimate.communication import Sent
from prereg_kernels.estimate.devices import Device
from prereg_kernels.estimate.head import Head
from prereg_kernels.estimate.memory import How, Shares
from prereg_kernels.estimate.settings import DTYPES, OPTIMIZERS, Settings
from prereg_kernels.estimate.structure import PARTS, Structure

FUSED_CALLS, EAGER_CALLS = 27.0, 43.0
"""Operators of PRe: of one chunk with an index; and of `eager_pre_loss`, forward and backward."""


@dataclass
class Work:
    """Of one GPU.

    Attributes:
        flops: of matrix products. moved: bytes that everything else reads and writes. calls: of
            operators.
    """

    flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved, self.calls + other.calls)

    def times(self, factor: float) -> Work:
        """So many times of it, in as many calls."""
        return Work(factor * self.flops, factor * self.moved, self.calls)

    def seconds(self, device: Device, itemsize: int) -> float:
        """The device's, or the host's where it launches slower."""
        busy = self.flops / device.flops[itemsize] + self.moved / device.bandwidth
        host = self.calls * device.call
        return max(busy, host) if device.overlaps else busy + host


def work(structure: Structure, settings: Settings, visual: int) -> dict[str, Work]:
    """{a part, or "update": its work on one GPU}, PRe aside."""
    samples = settings.samples
    found = {part: Work() for part in PARTS}
    for block, counts in structure.of_sample(settings.tokens, visual):
        again = block.layer > 0 and settings.checkpointing
        redone = counts.again if again else 0.0
        flops = counts.forward + counts.backward + redone
        moved = counts.moved * (1 + again) + counts.moved_again
        calls = counts.calls * (1 + again + 2 * bool(counts.moved_again or counts.backward))
        # Samples are rows of the same operators where text passes, and images often are not
        number = 1 if block.has_text else samples
        found[block.part] += Work(samples * flops, samples * moved, number * calls)
    found = {part: part_work.times(1 / settings.split) for part, part_work in found.items()}
    return found | {"update": update(structure, settings)}


def update(structure: Structure, settings: Settings) -> Work:
    """The optimizer reads weight, gradient and state, and writes weight and state."""
    shares = Shares.of(settings, structure.itemsize)
    own = structure.parameters(structure.trains) * shares.optimizer
    weight = 3.0 * DTYPES[settings.weights] + 2.0 * shares.state
    return Work(0.0, own * weight, 0.0)


def head_work(head: Head, how: How, settings: Settings) -> Work:
    """PRe's, its update among it."""
    numbers = OPTIMIZERS[settings.optimizer]
    updated = head.parameters * head.weight_itemsize * (3 + 2 * numbers)
    if how == "eager":
        return Work(head.flops, head.eager_moved + updated, EAGER_CALLS)
    return Work(head.flops, head.moved + updated, FUSED_CALLS)


def exchange(found: Sequence[Sent], device: Device, beside: float) -> float:
    """Seconds that communication adds to so many of arithmetic."""
    hidden = sum(x.seconds(device) for x in found if x.hidden)
    return sum(x.seconds(device) for x in found if not x.hidden) + max(0.0, hidden - beside)
