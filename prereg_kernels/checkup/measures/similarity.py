# SPDX-License-Identifier: Apache-2.0
"""How much the features of a layer still resemble the features that entered the LLM."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.checkup.measures.mean import MeanSums
from prereg_kernels.checkup.measures.scatter_matrix import Scatter
from prereg_kernels.checkup.measures.spectrum import SpectrumSums
from prereg_kernels.checkup.measures.tensors import (
    check_features,
    check_mean,
    lengths,
    pieces,
    working,
)

LEFT = 1e-4
"""Share of a squared norm that has to be left when the diagonals are subtracted: 3 digits."""


class Similarity(NamedTuple):
    """Of features h to reference features h0 of the same tokens."""

    cka: float  # linear CKA, 0 to 1: blind to rotations and one common scale
    cosine: float  # mean over tokens of cos(h_i, h0_i)
    centred_cosine: float  # the same after each one's mean token was subtracted
    relative_norm: float  # mean |h_i| / mean |h0_i|
    debiased_cka: float  # about 0 for independent features, whatever N; may be negative


class SimilaritySums:
    """`similarity` of features that arrive in batches.

    Args:
        means: (D,) of the features and of the reference, from `MeanSums` over the same rows, for
            the centred cosine and the debiased CKA; None leaves these NaN.

    Raises:
        ValueError: means of another shape, or that are not finite.

    Memory: one (D, D) matrix in float64.
    """

    def __init__(self, means: tuple[Tensor, Tensor] | None = None) -> None:
        for mean in means or ():
            check_mean(mean, "means")
        self._means = means
        self._cross = Scatter()
        self._cosine = [0.0, 0.0]  # as they are, centred
        self._norms = [0.0, 0.0]  # of the features, of the reference
        # with p_i, q_i the squared lengths of the centred rows: sums of p_i^2, q_i^2, p_i q_i
        self._squares = [0.0, 0.0, 0.0]

    @torch.no_grad()
    def update(self, features: Tensor, reference: Tensor) -> SimilaritySums:
        """Add a batch: (N, D) each, row i of the same token, any floating dtype, one device."""
        _check_pair(features, reference, self._cross.columns[0])
        self._cross.update(features, reference)
        for part in pieces(*features.shape):
            x, y = working(features[part], reference[part])
            for i, z in enumerate((x, y)):
                self._norms[i] += _total(torch.linalg.vector_norm(z, dim=1))
            sizes = lengths(x), lengths(y)
            self._cosine[0] += _total((x * y).sum(dim=1) / (sizes[0] * sizes[1]))
            if self._means is not None:
                x, y = x - self._means[0].to(x), y - self._means[1].to(y)
                cosine = (x * y).sum(dim=1) / (lengths(x, sizes[0]) * lengths(y, sizes[1]))
                self._cosine[1] += _total(cosine)
                p, q = (z.square().sum(dim=1).double() for z in (x, y))
                for i, product in enumerate((p * p, q * q, p * q)):
                    self._squares[i] += _total(product)
        return self

    def result(self, features: SpectrumSums, reference: SpectrumSums) -> Similarity:
        """Of all rows so far.

        Args:
            features, reference: the spectra's sums over the same rows. CKA divides by them, and
                whoever measures layers has them anyway, the reference's for all layers at once.

        Raises:
            ValueError: sums over another number of rows, means of other rows, fewer than two rows.
        """
        rows = self._cross.rows
        for name, sums in (("features", features), ("reference", reference)):
            if sums.scatter.rows != rows:
                raise ValueError(f"{name}: expected sums over {rows} rows, got {sums.scatter.rows}")
        if rows < 2:
            raise ValueError(f"features: expected at least 2 rows in all, got {rows}")
        pair = features.scatter, reference.scatter
        varying = all(bool(scatter.diagonal().any()) for scatter in pair)
        cosine, centred = (total / rows for total in self._cosine)
        return Similarity(
            _ratio(self._cross.sum(), pair[0].sum(), pair[1].sum()) if varying else math.nan,
            cosine,
            centred if self._means is not None else math.nan,
            self._norms[0] / self._norms[1] if self._norms[1] else math.nan,
            self._debiased(*pair) if self._means is not None and varying else math.nan,
        )

    def _debiased(self, *pair: Scatter) -> float:
        """CKA of unbiased estimates: Song et al. 2012, eq. 5, of centred rows.

        The kernels' diagonals are p and q; without them their rows add up to -p and -q.
        """
        n = self._cross.rows
        if n < 4:
            return math.nan
        assert self._means is not None and self._cross.means is not None
        traces = [float(scatter.diagonal().sum()) for scatter in pair]
        for i, (given, mean) in enumerate(zip(self._means, self._cross.means, strict=True)):
            off = float((given.to(mean) - mean).square().sum())
            if off > 1e-6 * traces[i] / n + 1e-12 * float(mean.square().sum()):
                raise ValueError("means: expected those of the same rows, got others")

        def hsic(total: float, p: float, q: float, products: float) -> float:
            return total - products * (1 + 2 / (n - 2)) + p * q / ((n - 1) * (n - 2))

        p, q = traces
        totals = pair[0].sum(), pair[1].sum()
        own = hsic(totals[0], p, p, self._squares[0]), hsic(totals[1], q, q, self._squares[1])
        # where one row outweighs all others, subtracting its square leaves float32's rounding
        if any(value < LEFT * total for value, total in zip(own, totals, strict=True)):
            return math.nan
        return _ratio(hsic(self._cross.sum(), p, q, self._squares[2]), *own)


def similarity(features: Tensor, reference: Tensor) -> Similarity:
    """Linear CKA, cosines and relative norm of features to reference features.

    `CKA = |Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|)` with centred columns and Frobenius norms
    (arXiv 1905.00414). Of independent features it is not 0 but about `d / (N + d)`,
    d their effective dimension: compare at the same N only, and look at the debiased CKA, which
    takes the unbiased estimate of each of the three (Song et al. 2012; arXiv 2010.15327).

    Args:
        features, reference: (N, D) each, N at least 2, any floating dtype. A row of zeros has
            cosine 0.

    Returns:
        NaN for CKA where either is constant, and for the relative norm where the reference is 0.
        For the debiased CKA also with fewer than four rows, or where a single row outweighs all
        others together (a massive activation in one token).

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, or values that are not finite.

    Example:
        >>> from prereg_kernels.checkup import similarity
        >>> reference = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> found = similarity(2 * reference, reference)
        >>> round(found.cka, 6), round(found.cosine, 6), round(found.relative_norm, 6)
        (1.0, 1.0, 2.0)
    """
    _check_pair(features, reference)
    means = (MeanSums().update(features).result(), MeanSums().update(reference).result())
    sums = SimilaritySums(means).update(features, reference)
    return sums.result(SpectrumSums().update(features), SpectrumSums().update(reference))


def _check_pair(features: Tensor, reference: Tensor, columns: int | None = None) -> None:
    check_features(features, columns=columns)
    check_features(reference, "reference", features.shape[1])
    if len(reference) != len(features):
        expected, got = tuple(features.shape), tuple(reference.shape)
        raise ValueError(f"reference: expected shape {expected}, got {got}")


def _ratio(cross: float, x: float, y: float) -> float:
    return cross / math.sqrt(x * y)


def _total(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))
