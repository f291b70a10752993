# SPDX-License-Identifier: Apache-2.0
"""TapProbe: the two gradients that meet in a tap, and the time that its backward pass takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class TapProbe:
    """Measures one backward pass of `pre_tap`, without a sync. The pass's results are unchanged.

    The two gradients at a visual token are g, which arrives from the rest of the network, and p,
    which the tap adds. They are sums in the gradient of `hidden`, so p is computed once more by
    itself, at two thirds of the tap's matmuls.

    Attributes:
        sums: (3,), float32 (float64 for float64), over the visual tokens: of |g|^2, of |p|^2, and
            of g . p. With a `group` of the same hidden states, over all of its tokens. None before
            backward, and where `hidden` needs no gradient.

    Example:
        >>> from prereg_kernels import pre_tap
        >>> hidden, anchor = torch.ones(3, 2, requires_grad=True), torch.zeros(3, 2)
        >>> probe = TapProbe()
        >>> tapped, loss = pre_tap(hidden, anchor, loss="mse", probe=probe)
        >>> (tapped.sum() + 3 * loss).backward()
        >>> probe.sums  # of six ones, and of six times 3 * 2 / 6
        tensor([6., 6., 6.])
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self._clock: tuple[Any, Any] | None = None

    def seconds(self) -> float | None:
        """The seconds of the backward pass, without the probe's own work. This is a sync.

        They are known on CPUs and on CUDA's and ROCm's devices; elsewhere this is None.
        """
        if self._clock is None:
            return None
        start, end = self._clock
        if isinstance(start, float):
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    @contextmanager
    def timing(self, device: torch.device) -> Iterator[None]:
        """Around what is timed."""
        start = _now(device)
        yield
        self._clock = None if start is None else (start, _now(device))

    def see(self, arriving: Tensor | None, own: Tensor) -> None:
        """The gradients of the visual tokens' rows, (N, D): g, where there is one, and p."""
        p = own.to(torch.promote_types(own.dtype, torch.float32))
        g = torch.zeros_like(p) if arriving is None else arriving.to(p.dtype)
        self.sums = torch.stack([(g * g).sum(), (p * p).sum(), (g * p).sum()])


def _now(device: torch.device) -> Any:
    """What `TapProbe.seconds` subtracts; None on devices whose clock is not known."""
    if device.type == "cpu":
        return time.perf_counter()
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
