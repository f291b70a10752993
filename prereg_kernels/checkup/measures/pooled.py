# SPDX-License-Identifier: Apache-2.0
"""From patches to the features that a probe reads: one row an image, or an object."""

from __future__ import annotations

import torch
from torch import Tensor

from prereg_kernels.checkup.measures.tensors import check_features, check_ids


@torch.no_grad()
def pool(features: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each group's rows.

    Args:
        features: (N, D), any floating dtype.
        groups: (N,) integer ids of images, or of objects; -1 is left out.

    Returns:
        (G, D) means, float32 (float64 of float64), and the (G,) ids that they are of, ascending.

    Raises:
        ValueError: shapes that do not fit, or features that are not finite.

    Example:
        >>> from prereg_kernels.checkup import pool
        >>> pool(torch.tensor([[1.0], [3.0], [5.0], [9.0]]), torch.tensor([0, 0, 2, -1]))
        (tensor([[2.],
                [5.]]), tensor([0, 2]))
    """
    check_features(features)
    check_ids(groups, "groups", len(features))
    rows = (groups >= 0).nonzero().squeeze(1).to(features.device)
    ids, group = torch.unique(groups.to(features.device)[rows], return_inverse=True)
    dtype = features.dtype if features.dtype == torch.float64 else torch.float32
    sums = features.new_zeros(len(ids), features.shape[1], dtype=torch.float64)
    sums.index_add_(0, group, features[rows].double())
    return (sums / group.bincount(minlength=len(ids))[:, None]).to(dtype), ids
