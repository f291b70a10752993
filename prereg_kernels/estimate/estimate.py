# SPDX-License-Identifier: Apache-2.0
"""The estimate: every figure of a step with PRe, without it, and with eager PRe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prereg_kernels.estimate import cpu
from prereg_kernels.estimate.communication import Sent, sent
from prereg_kernels.estimate.devices import DEVICES, Device
from prereg_kernels.estimate.head import Head, head_of
from prereg_kernels.estimate.memory import How, Moment, peak, timeline
from prereg_kernels.estimate.settings import Settings
from prereg_kernels.estimate.structure import Structure
from prereg_kernels.estimate.time import Work, exchange, head_work, work


@dataclass(frozen=True)
class Estimate:
    """Of one step.

    Attributes:
        visual_tokens: of an image.
        flops: {part: floating-point operations of all GPUs}. head_flops: PRe's.
        seconds: {"none", "fused", "eager": of the step}. parts: of the step without PRe, by part.
        moments: {"none", "fused", "eager": one GPU's memory over the step}.
        sent: by one GPU.
        error: of seconds and bytes, as shares of them: nine tenths of the measured steps are
            closer; None: nothing was measured.
    """

    structure: Structure
    settings: Settings
    visual_tokens: int
    head: Head
    flops: dict[str, float]
    head_flops: float
    seconds: dict[str, float]
    parts: dict[str, float]
    moments: dict[str, list[Moment]]
    sent: list[Sent]
    error: dict[str, float] | None

    @property
    def time_share(self) -> float:
        """PRe's, of a step without it."""
        return self.seconds["fused"] / self.seconds["none"] - 1

    @property
    def flops_share(self) -> float:
        """PRe's, of a step without it."""
        return self.head_flops / sum(self.flops.values())

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        peaks = {how: peak(moments) for how, moments in self.moments.items()}
        return {
            "model": self.structure.name,
            "parameters": self.structure.parameters(),
            "trained": self.structure.parameters(self.structure.trains),
            "settings": self.settings.describe(),
            "visual_tokens": self.visual_tokens,
            "pre": asdict(self.head) | {"parameters": self.head.parameters},
            "flops": self.flops | {"all": sum(self.flops.values()), "pre": self.head_flops},
            "flops_share": self.flops_share,
            "seconds": self.seconds,
            "seconds_of_parts": self.parts,
            "time_share": self.time_share,
            "peak_bytes": {how: moment.total for how, moment in peaks.items()},
            "peak": {how: asdict(moment) for how, moment in peaks.items()},
            "pre_adds_bytes": peaks["fused"].total - peaks["none"].total,
            "sent": [asdict(x) for x in self.sent],
            "error": self.error,
        }


def estimate(structure: Structure, settings: Settings) -> Estimate:
    """Everything.

    Raises:
        ValueError: settings that the model cannot have.
    """
    visual = settings.visual_tokens or structure.visual_tokens
    device: Device | None = DEVICES.get(settings.gpu)
    head = head_of(structure, settings, visual, None if device is None else device.memory)
    done = work(structure, settings, visual)
    exchanged = sent(structure, settings, visual, None)
    if device is None:
        calibration = cpu.calibration()
        rate, error = calibration.device(structure.itemsize), calibration.error
    else:
        rate, error = device, None
    itemsize = structure.itemsize
    parts = {part: x.seconds(rate, itemsize) for part, x in done.items()}
    computed = sum(parts.values())
    seconds = {"none": computed + exchange(exchanged, rate, computed)}
    exchanged = sent(structure, settings, visual, head)
    hows: tuple[How, ...] = ("fused", "eager")
    for how in hows:
        own = computed + head_work(head, how, settings).seconds(rate, itemsize)
        seconds[how] = own + exchange(exchanged, rate, own)
    moments = {
        "none": timeline(structure, settings, visual, None, "none"),
        "fused": timeline(structure, settings, visual, head, "fused"),
        "eager": timeline(structure, settings, visual, head, "eager"),
    }
    if device is None:
        for moment in (moment for several in moments.values() for moment in several):
            moment.bytes["correction"] = calibration.overhead[itemsize]
    share = settings.images / settings.samples * settings.split  # of one GPU's are all of them
    flops = {part: x.flops * share for part, x in done.items() if x.flops}
    head_flops = head.flops * settings.images / settings.samples
    return Estimate(
        structure, settings, visual, head, flops, head_flops, seconds, parts, moments, exchanged,
        error,
    )  # fmt: skip


def measured_work(
    structure: Structure, settings: Settings, with_pre: bool
) -> tuple[Work, list[Moment]]:
    """All that a CPU does in a step, and its memory: what measured steps are compared with."""
    visual = settings.visual_tokens or structure.visual_tokens
    head = head_of(structure, settings, visual, None)
    total = sum(work(structure, settings, visual).values(), Work())
    if with_pre:
        total += head_work(head, "fused", settings)
    how: How = "fused" if with_pre else "none"
    return total, timeline(structure, settings, visual, head if with_pre else None, how)
