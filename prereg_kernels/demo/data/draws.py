# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are a pure function of their address.

Every draw is a hash of (key, index, position), so that sample 1,000,000 costs what sample 0 does,
a batch gives each of its samples what that sample gives alone, and resuming a run needs no
generator state.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(*parts: int | str) -> int:
    """A 64-bit key for a named stream: `stream_key("train", 3)`; stable over machines and runs."""
    text = "\x1f".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection that looks random."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Draws:
    """Uniform draws for a batch of samples, taken column by column.

    Args:
        key: the stream, from `stream_key`.
        indices: (B,) non-negative sample indices.
    """

    def __init__(self, key: int, indices: NDArray[np.int64]) -> None:
        self._state = _mix(_mix(indices.astype(np.uint64) * _GOLDEN) ^ np.uint64(key))
        self._taken = 0

    def uniform(self, columns: int) -> NDArray[np.float64]:
        """(B, columns) numbers in [0, 1), independent of all that were taken before."""
        positions = np.arange(self._taken + 1, self._taken + 1 + columns, dtype=np.uint64)
        self._taken += columns
        bits = _mix(self._state[:, None] + positions * _GOLDEN)
        return (bits >> np.uint64(11)) * 2.0**-53

    def integers(self, low: int, high: int, columns: int) -> NDArray[np.int64]:
        """(B, columns) integers in [low, high]."""
        return low + (self.uniform(columns) * (high - low + 1)).astype(np.int64)

    def permutation(self, size: int) -> NDArray[np.int64]:
        """(B, size): each row a permutation of range(size)."""
        return np.argsort(self.uniform(size), axis=1, kind="stable")
