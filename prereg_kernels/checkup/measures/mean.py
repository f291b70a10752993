# SPDX-License-Identifier: Apache-2.0
"""The mean patch, which the centred measures subtract."""

from __future__ import annotations

import torch
from torch import Tensor

from prereg_kernels.checkup.measures.tensors import check_features


class MeanSums:
    """The mean row of features that arrive in batches: the first of two passes.

    Centred cosines normalise *after* the mean is subtracted, so no sums over one pass give them:
    `StructureSums` and `SimilaritySums` take the mean as an argument. It is the mean over all
    patches of all images, background included; one taken over the first images of a data set is as
    good where the second pass costs too much, and then has to be said.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sum: Tensor | None = None

    @torch.no_grad()
    def update(self, features: Tensor) -> MeanSums:
        """Add a batch, (N, D), any floating dtype. Raises ValueError as `check_features`."""
        check_features(features, columns=None if self._sum is None else len(self._sum))
        total = features.sum(dim=0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self.rows += len(features)
        return self

    def result(self) -> Tensor:
        """(D,), float64. Raises ValueError where no row has come."""
        if self._sum is None or not self.rows:
            raise ValueError("features: expected at least 1 row in all, got 0")
        return self._sum / self.rows
