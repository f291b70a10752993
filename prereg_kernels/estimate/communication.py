# SPDX-License-Identifier: Apache-2.0
"""What the GPUs of a step send each other."""

from __future__ import annotations

from dataclasses import dataclass

from prereg_kernels.estimate.devices import Device
from prereg_kernels.estimate.head import Head
from prereg_kernels.estimate.settings import DTYPES, Settings
from prereg_kernels.estimate.structure import Structure


@dataclass(frozen=True)
class Sent:
    """By one GPU, in one step.

    Attributes:
        kind: of collective.
        what: is sent.
        bytes: of the model's. pre: of PRe's head.
        group: GPUs that take part.
        hidden: whether it goes on beside arithmetic.
    """

    kind: str
    what: str
    bytes: float
    pre: float
    group: int
    hidden: bool

    def seconds(self, device: Device) -> float:
        """The slowest way between two of the group decides."""
        way = device.link if self.group <= device.node else device.network
        return (self.bytes + self.pre) / way


def sent(structure: Structure, settings: Settings, visual: int, head: Head | None) -> list[Sent]:
    """All of a step: of what it gathers or scatters, a ring sends (g - 1) / g; both for a sum."""
    found: list[Sent] = []
    group, kind, itemsize = settings.replicas, settings.parallel, DTYPES[settings.weights]
    # What is gathered is of low precision, whatever is kept
    gathered = structure.parameters() * min(itemsize, structure.itemsize) / settings.split
    gradients = structure.parameters(structure.trains) * itemsize / settings.split
    own = 0.0 if head is None else float(head.parameters * head.weight_itemsize)
    share = (group - 1) / group
    if group > 1:
        if kind in ("ddp", "tp"):
            found.append(
                Sent("all-reduce", "gradients", 2 * share * gradients, 2 * share * own, group, True)
            )
        else:
            scattered = share * gradients, share * own, group, True
            found.append(Sent("reduce-scatter", "gradients", *scattered))
            times = 1 if kind == "zero2" else 2  # for forward, and again for backward
            weights = times * share * gathered, times * share * own, group, True
            found.append(Sent("all-gather", "weights", *weights))
    if settings.split > 1:
        positions = settings.samples * (settings.tokens + visual)
        sums = structure.layers * (6 if settings.checkpointing else 4)  # two a pass over a layer
        part = (settings.split - 1) / settings.split
        row = 2 * part * positions * structure.width * structure.itemsize
        found.append(Sent("all-reduce", "activations", sums * row, 0.0, settings.split, False))
    return found
