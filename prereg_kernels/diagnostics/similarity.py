"""How much the features of a layer still resemble the features that entered the LLM."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.diagnostics.mean import MeanSums
from prereg_kernels.diagnostics.scatter import Scatter
from prereg_kernels.diagnostics.spectrum import SpectrumSums
from prereg_kernels.diagnostics.tensors import check_features, lengths, pieces, working


class Similarity(NamedTuple):
    """Of features h to reference features h0 of the same tokens."""

    cka: float  # linear CKA, 0 to 1: blind to rotations and one common scale
    cosine: float  # mean over tokens of cos(h_i, h0_i)
    centred_cosine: float  # the same after each one's mean token was subtracted
    relative_norm: float  # mean |h_i| / mean |h0_i|


class SimilaritySums:
    """`similarity` of features that arrive in batches.

    Args:
        means: (D,) of the features and of the reference, from `MeanSums`, for the centred cosine;
            None leaves that NaN.

    Memory: one (D, D) matrix in float64.
    """

    def __init__(self, means: tuple[Tensor, Tensor] | None = None) -> None:
        self._means = means
        self._cross = Scatter()
        self._cosine = [0.0, 0.0]  # as they are, centred
        self._norms = [0.0, 0.0]  # of the features, of the reference

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
        return self

    def result(self, features: SpectrumSums, reference: SpectrumSums) -> Similarity:
        """Of all rows so far.

        Args:
            features, reference: the spectra's sums over the same rows. CKA divides by them, and
                whoever measures layers has them anyway, the reference's for all layers at once.

        Raises:
            ValueError: sums over another number of rows, or fewer than two rows.
        """
        rows = self._cross.rows
        for name, sums in (("features", features), ("reference", reference)):
            if sums.scatter.rows != rows:
                raise ValueError(f"{name}: expected sums over {rows} rows, got {sums.scatter.rows}")
        if rows < 2:
            raise ValueError(f"features: expected at least 2 rows in all, got {rows}")
        own = features.scatter.sum() * reference.scatter.sum()
        varying = bool(features.scatter.diagonal().any() and reference.scatter.diagonal().any())
        cosine, centred = (total / rows for total in self._cosine)
        return Similarity(
            self._cross.sum() / math.sqrt(own) if varying else math.nan,
            cosine,
            centred if self._means is not None else math.nan,
            self._norms[0] / self._norms[1] if self._norms[1] else math.nan,
        )


def similarity(features: Tensor, reference: Tensor) -> Similarity:
    """Linear CKA, cosines and relative norm of features to reference features.

    `CKA = |Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|)` with centred columns and Frobenius norms
    (arXiv 1905.00414, eq. 3 and 4). Of independent features it is not 0 but about D / (N + D)
    for equal spectra: have many more rows than dimensions, and compare at the same N only.

    Args:
        features, reference: (N, D) each, N at least 2, any floating dtype. A row of zeros has
            cosine 0.

    Returns:
        NaN for CKA where either is constant, and for the relative norm where the reference is 0.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, or values that are not finite.
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


def _total(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))
