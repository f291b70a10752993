# SPDX-License-Identifier: Apache-2.0
"""How fast a run trains: tokens and images a second, the model's use of the device, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from prereg_kernels.train.facts import Facts
from prereg_kernels.train.flops import StepFlops, peak_flops

TIMED = (
    "tokens_per_second", "visual_tokens_per_second", "images_per_second", "steps_per_second",
    "mfu", "pre_share", "pre_seconds", "peak_memory_gib",
)  # fmt: skip
"""Figures that a run has otherwise when it is run again."""


class Throughput:
    """The figures since the last log, without what happens between steps, as saving does.

    Args:
        model: a plain one, or PEFT's.
        is_narrow: whether its products are of 16-bit numbers, by which a device's peak is known.
    """

    def __init__(self, model: Any, is_narrow: bool) -> None:
        self._flops, self._is_narrow = StepFlops(model), is_narrow
        self._counts = [0, 0, 0, 0]  # tokens, visual tokens, images, pixels
        self._seconds, self._start = 0.0, float("nan")
        self._is_running = False
        self._step: int | None = None  # where the counts begin

    def begin(self, step: int) -> None:
        """A step's batches are about to be read, after so many steps."""
        if self._step is None:
            self._step = step
        if not self._is_running:
            self._start, self._is_running = time.perf_counter(), True

    def add(self, facts: Facts) -> None:
        """A micro-batch of this rank."""
        found = (facts.tokens, facts.visual_tokens, facts.images, facts.pixels)
        self._counts = [a + b for a, b in zip(self._counts, found, strict=True)]

    def pause(self) -> None:
        """Until the next step begins."""
        if self._is_running:
            self._seconds += time.perf_counter() - self._start
            self._is_running = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no part of training."""
        self.pause()
        yield

    def take(self, step: int, accelerator: Any, pre_seconds: float | None) -> dict[str, float]:
        """The figures up to this step, a collective; the time goes on with the next.

        Args:
            pre_seconds: what PRe took of a step.
        """
        self.pause()
        seconds, steps = self._seconds, step - (step if self._step is None else self._step)
        self._seconds, self._step = 0.0, step
        device = accelerator.device
        numbers = torch.tensor([*self._counts, seconds], dtype=torch.float32, device=device)
        memory = torch.tensor([peak_memory(device)], dtype=torch.float32, device=device)
        self._counts = [0, 0, 0, 0]
        *counts, total = accelerator.reduce(numbers, reduction="sum").tolist()
        ranks = accelerator.num_processes
        figures = {"peak_memory_gib": accelerator.gather(memory).max().item() / 2**30}
        if not steps or not total:
            return figures
        tokens, visual, images, pixels = counts
        mean = total / ranks
        figures |= {
            "tokens_per_second": tokens / mean, "visual_tokens_per_second": visual / mean,
            "images_per_second": images / mean, "steps_per_second": steps / mean,
        }  # fmt: skip
        peak, flops = peak_flops(device), self._flops.of(tokens, visual, pixels)
        if peak is not None and flops is not None and self._is_narrow:
            figures["mfu"] = flops / total / peak
        if pre_seconds is not None:
            figures["pre_share"] = pre_seconds / (mean / steps)
        return figures


def peak_memory(device: torch.device) -> float:
    """Bytes: on CUDA those of tensors, since the start; on a CPU those of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
