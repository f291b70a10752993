# SPDX-License-Identifier: Apache-2.0
"""The scatter matrix of features, which the spectrum and CKA are read from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prereg_kernels.checkup.measures.tensors import working

ROWS = 4096
"""Of one matmul: bounds its copy of the rows and the rounding of its float32 sums."""

STRIP = 512
"""Rows of the matrix that are computed at a time: a symmetric one from its diagonal on."""


class Scatter:
    """sum_i (x_i - mean x) (y_i - mean y)^T over rows that arrive in batches; y = x unless given.

    Products are float32 (float64 where an input is), of rows centred on their own batch's mean, and
    added in float64: batches combine through their means (Chan, Golub, LeVeque 1983), so nothing
    cancels, however large the means are.

    Memory: one (D, E) matrix in float64, and 64 MB in a batch. Of a symmetric matrix only the upper
    triangle is filled. A batch of fewer than ~1,000 rows spends its time on that matrix.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.means: tuple[Tensor, Tensor] | None = None  # (D,), (E,), float64
        self._matrix: Tensor | None = None
        self._symmetric = True

    @property
    def columns(self) -> tuple[int | None, int | None]:
        """D and E; None before the first batch."""
        return (None, None) if self.means is None else (len(self.means[0]), len(self.means[1]))

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None) -> Scatter:
        """Add the rows of x (N, D) and y (N, E), which the caller has checked."""
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), ROWS):
                part = slice(start, start + ROWS)
                self._add(x[part], None if y is None else y[part])
        return self

    def _add(self, x: Tensor, y: Tensor | None) -> None:
        n, symmetric = len(x), y is None
        x, *others = working(x) if y is None else working(x, y)
        x, x_rest, x_mean = _centre(x)
        y, y_rest, y_mean = _centre(*others) if others else (x, x_rest, x_mean)
        if self.means is None:
            self._symmetric = symmetric
            self._matrix = x_mean.new_zeros(x.shape[1], y.shape[1])
            self.means = (torch.zeros_like(x_mean), torch.zeros_like(y_mean))
        assert self._matrix is not None
        total = self.rows + n
        steps = x_mean - self.means[0], y_mean - self.means[1]
        # what the two means add, and what rounding the batch's mean left in its products
        left = torch.stack([steps[0] * (self.rows / total * n), -x_rest / n])
        right = torch.stack([steps[1], y_rest])
        for i, first in self._strips():
            strip = self._matrix[i : i + STRIP, first:]
            strip.addmm_(left[:, i : i + STRIP].T, right[:, first:])
            strip += x[:, i : i + STRIP].T @ y[:, first:]
        self.means = (
            self.means[0] + steps[0] * (n / total),
            self.means[1] + steps[1] * (n / total),
        )
        self.rows = total

    def _strips(self) -> Iterator[tuple[int, int]]:
        """First row of each strip and the column that it starts at."""
        assert self._matrix is not None
        for i in range(0, len(self._matrix), STRIP):
            yield i, i if self._symmetric else 0

    def diagonal(self) -> Tensor:
        """(D,), float64: the squared deviations; exactly 0 in a dimension that is constant."""
        assert self._matrix is not None
        return self._matrix.diagonal()

    def sum(self, scale: Tensor | None = None, power: int = 2) -> float:
        """Sum of |entry_ij scale_i scale_j|^power over the whole matrix."""
        assert self._matrix is not None
        total = 0.0
        for i, first in self._strips():
            strip = self._matrix[i : i + STRIP, first:]
            if scale is not None:
                strip = strip * scale[i : i + STRIP, None] * scale[first:]
            powers = strip.abs().pow(power)
            if self._symmetric:  # right of the diagonal block, each entry stands for two
                size = len(strip)
                block = powers[:, :size]
                upper = block.triu(1).sum() + powers[:, size:].sum()
                total += float(2 * upper + block.diagonal().sum())
            else:
                total += float(powers.sum())
        return total


def _centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows less their rounded mean, what is left of their sum, and their mean, both float64.

    Of a constant the rounded mean may be off by its last bits: what is left makes it whole.
    """
    shift = x.mean(dim=0, dtype=torch.float64).to(x.dtype)
    centred = x - shift
    rest = centred.sum(dim=0).double()
    return centred, rest, shift.double() + rest / len(x)
