# SPDX-License-Identifier: Apache-2.0
"""Token norms and massive activations: a few values that dwarf all others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.checkup.measures.tensors import check_features, pieces, working

OUTLIER = 10.0
"""Times the median norm, from which a token counts as an outlier."""

MASSIVE = 100.0
MASSIVE_RATIO = 1000.0
"""Magnitude, and times the median magnitude, above which a value is a massive activation."""


class MassiveDimension(NamedTuple):
    """A dimension in which massive activations occur."""

    dimension: int
    tokens: int  # that have one there
    largest: float  # magnitude


class Norms(NamedTuple):
    """Euclidean norms of the tokens, and their massive activations."""

    mean: float
    median: float  # of an even number of tokens, the mean of the middle two
    largest: float
    outliers: float  # share of tokens whose norm exceeds 10 times the median
    massive: float  # share of tokens that have a massive activation
    massive_dimensions: tuple[MassiveDimension, ...]  # the most tokens first

    @classmethod
    def of(
        cls, norms: Tensor, massive_tokens: int, dimensions: Iterable[MassiveDimension]
    ) -> Norms:
        """From parts that may come from several batches.

        Args:
            norms: (N,) of every token.
            massive_tokens: how many of them have a massive activation.
            dimensions: those of each batch; of one that repeats, the tokens are added up.

        Raises:
            ValueError: no norms, or some that are not finite.
        """
        if not len(norms):
            raise ValueError("features: expected at least 1 row in all, got 0")
        if not bool(torch.isfinite(norms).all()):
            raise ValueError("norms: expected finite values, got NaN or infinity")
        by_dimension: dict[int, MassiveDimension] = {}
        for more in dimensions:
            before = by_dimension.get(more.dimension, MassiveDimension(more.dimension, 0, 0.0))
            tokens, largest = before.tokens + more.tokens, max(before.largest, more.largest)
            by_dimension[more.dimension] = MassiveDimension(more.dimension, tokens, largest)
        norms = norms.double()
        median = float(_median(norms[None]))
        return cls(
            float(norms.mean()),
            median,
            float(norms.max()),
            float((norms > OUTLIER * median).double().mean()),
            massive_tokens / len(norms),
            tuple(sorted(by_dimension.values(), key=lambda one: (-one.tokens, -one.largest))),
        )


class NormSums:
    """`token_norms` of features that arrive in batches. Keeps one number a token.

    Attributes:
        massive_tokens: how many rows so far have a massive activation.
    """

    def __init__(self) -> None:
        self.massive_tokens = 0
        self._norms: list[Tensor] = []
        self._counts: Tensor | None = None  # (D,) tokens with a massive activation there
        self._largest: Tensor | None = None  # (D,) largest magnitude of those

    @torch.no_grad()
    def update(self, features: Tensor) -> NormSums:
        """Add a batch, (N, D), any floating dtype. Raises ValueError as `token_norms` does."""
        check_features(features, columns=None if self._counts is None else len(self._counts))
        if self._counts is None or self._largest is None:
            self._counts = features.new_zeros(features.shape[1], dtype=torch.int64)
            self._largest = features.new_zeros(features.shape[1], dtype=torch.float64)
        for part in pieces(*features.shape):
            (x,) = working(features[part])
            self._norms.append(torch.linalg.vector_norm(x, dim=1).double().cpu())
            # medians are slow, and only of use for tokens that can have a massive activation
            magnitudes = x[torch.linalg.vector_norm(x, math.inf, dim=1) > MASSIVE].abs()
            threshold = (MASSIVE_RATIO * _median(magnitudes)).clamp_min(MASSIVE)
            massive = magnitudes > threshold[:, None]
            self.massive_tokens += int(massive.any(dim=1).sum())
            self._counts += massive.sum(dim=0)
            if len(magnitudes):
                largest = magnitudes.where(massive, 0.0).amax(dim=0).double()
                self._largest = torch.maximum(self._largest, largest)
        return self

    @property
    def norms(self) -> Tensor:
        """(N,) float64 on the CPU: of every row so far."""
        return torch.cat(self._norms) if self._norms else torch.empty(0, dtype=torch.float64)

    @property
    def dimensions(self) -> list[MassiveDimension]:
        """Those with massive activations, ascending."""
        if self._counts is None or self._largest is None:
            return []
        return [
            MassiveDimension(d, int(self._counts[d]), float(self._largest[d]))
            for d in self._counts.nonzero().flatten().tolist()
        ]

    def result(self) -> Norms:
        """Of all rows so far. Raises ValueError where there is none."""
        return Norms.of(self.norms, self.massive_tokens, self.dimensions)


def token_norms(features: Tensor) -> Norms:
    """Norms of the tokens, and the dimensions in which massive activations occur.

    A massive activation has a magnitude above 100 and above 1,000 times the median magnitude of its
    hidden state (arXiv 2402.17762, section 2), which is taken here over the D values of its token.

    Args:
        features: (N, D), N at least 1, any floating dtype.

    Raises:
        ValueError: another shape, no rows, or values that are not finite.

    Example:
        >>> from prereg_kernels.checkup import token_norms
        >>> features = torch.ones(3, 1024)
        >>> features[1, 5] = 2000.0
        >>> found = token_norms(features)
        >>> found.median, found.massive_dimensions
        (32.0, (MassiveDimension(dimension=5, tokens=1, largest=2000.0),))
    """
    return NormSums().update(features).result()


def _median(x: Tensor) -> Tensor:
    """Over the last dimension, the mean of the middle two where there are two."""
    n = x.shape[-1]
    low = x.kthvalue((n + 1) // 2).values
    return low if n % 2 else (low + x.kthvalue(n // 2 + 1).values) / 2
