# SPDX-License-Identifier: Apache-2.0
"""The linear probe: how well can a linear classifier read a label from features?"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prereg_kernels.checkup.intervals import half_width
from prereg_kernels.checkup.measures.tensors import check_features, check_ids

# Multiplications of a product. Up to here a fit on two cores (AMD Zen 3) was faster with one thread
_WORTH_THREADS = 2e8


class NoProbeError(ValueError):
    """The labels are sound, but allow no probe: too few classes, groups or rows of a class."""


class Probe(NamedTuple):
    """Test accuracy of a linear probe over repeated splits."""

    mean: float
    half_width: float  # of the 95% interval of the mean; NaN for a single split
    chance: float  # accuracy of always answering the most frequent class
    accuracies: tuple[float, ...]  # one a split

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the mean, which may leave [0, 1]."""
        return self.mean - self.half_width, self.mean + self.half_width


def probe(
    features: Tensor,
    labels: Tensor,
    *,
    groups: Tensor | None = None,
    splits: int = 5,
    test_share: float = 0.25,
    strength: float = 1.0,
    seed: int = 0,
) -> Probe:
    """`linear_probe` over repeated random splits of one set of features.

    The splits share most of their rows, so their spread alone would make the interval too narrow:
    it is the t interval with Nadeau and Bengio's correction (2003), a variance of the mean of
    `(1 / splits + test_share / (1 - test_share)) * variance`.

    Args:
        features: (N, D), any floating dtype, one row an image or object: see `pool`.
        labels: (N,) integers.
        groups: (N,) integer ids; the rows of one group stay on one side of each split. Give the
            image of each object: objects of an image know of each other. None: each row is its own.
        splits, test_share, seed: how many splits, the share of groups in each test set, and what
            they are drawn with. Equal seeds give equal splits, for every layer.
        strength: as in `linear_probe`.

    Raises:
        NoProbeError: a single class or group, or a class so rare that a training set has only one.
        ValueError: other shapes, features that are not finite, `splits` below 1, or a `test_share`
            outside (0, 1).

    Example:
        >>> from prereg_kernels.checkup import probe
        >>> labels = torch.arange(40) % 2
        >>> found = probe(labels[:, None].float(), labels)
        >>> found.mean, found.chance, found.interval
        (1.0, 0.5, (1.0, 1.0))
    """
    from sklearn.model_selection import GroupShuffleSplit

    check_features(features)
    check_ids(labels, "labels", len(features))
    y = labels.detach().cpu()
    counts = y.unique(return_counts=True)[1]
    if len(counts) < 2:
        raise NoProbeError(f"labels: expected at least 2 classes, got {len(counts)}")
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share: expected a share between 0 and 1, got {test_share}")
    if groups is None:
        groups = torch.arange(len(features))
    check_ids(groups, "groups", len(features))
    count = groups.unique().numel()
    if count < 2:
        raise NoProbeError(f"groups: expected at least 2 different ones, got {count}")

    x = features.detach().cpu()
    draw = GroupShuffleSplit(splits, test_size=test_share, random_state=seed)
    accuracies = []
    for train, test in draw.split(np.empty(len(x)), groups=groups.cpu().numpy()):
        if y[train].unique().numel() < 2:
            raise NoProbeError(
                f"labels: the {len(train)} rows of a training set have a single class; expected "
                "more rows of the others"
            )
        accuracies.append(linear_probe(x[train], y[train], x[test], y[test], strength=strength))
    half = half_width(accuracies, test_share)
    chance = int(counts.max()) / len(y)
    return Probe(float(np.mean(accuracies)), half, chance, tuple(accuracies))


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, strength: float = 1.0
) -> float:
    """Test accuracy of multinomial logistic regression on standardised features.

    Args:
        train_x, test_x: (N, D) features, any floating dtype; scaled by the training set's mean and
            deviation.
        train_y, test_y: (N,) integer labels.
        strength: C, the inverse of scikit-learn's L2 penalty.

    Returns:
        The share of right answers on the test set, in [0, 1].

    Raises:
        ValueError: shapes that do not fit, features that are not finite, labels that are no
            integers, a single class, a strength that is not above 0.

    Example:
        >>> from prereg_kernels.checkup import linear_probe
        >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> test_x, test_y = torch.tensor([[-3.0], [3.0], [4.0], [5.0]]), torch.tensor([0, 1, 1, 0])
        >>> linear_probe(x, y, test_x, test_y)
        0.75
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.dim() != 2 or tuple(y.shape) != x.shape[:1]:
            raise ValueError(
                f"{name}_x, {name}_y: expected shapes (N, D) and (N,), "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        check_ids(y, f"{name}_y", len(x))
    if not len(test_x) or test_x.shape[1] != train_x.shape[1]:
        raise ValueError(
            f"test_x: expected at least 1 row of {train_x.shape[1]} columns, got "
            f"{tuple(test_x.shape)}"
        )
    if not strength > 0:
        raise ValueError(f"strength: expected a number above 0, got {strength}")
    classes = train_y.unique().numel()
    if classes < 2:
        raise ValueError(f"train_y: expected at least 2 classes, got {classes}")
    scaler = StandardScaler()
    fit = scaler.fit_transform(_array(train_x, "train_x"))
    held_out = scaler.transform(_array(test_x, "test_x"))
    if 2 * fit.shape[0] <= fit.shape[1]:
        # the penalised weights lie in the span of the training rows: an orthonormal basis of it
        # gives the same problem, iteration by iteration, in N dimensions instead of D
        basis, coordinates = np.linalg.qr(fit.T)
        fit, held_out = coordinates.T, held_out @ basis
    probe = LogisticRegression(C=strength, max_iter=300)
    with warnings.catch_warnings(), _threads(fit.size * classes):
        # dependent dimensions may not converge, and need not
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(fit, train_y.cpu().numpy())
    return float(probe.score(held_out, test_y.cpu().numpy()))


def _threads(multiplications: int) -> AbstractContextManager[object]:
    """BLAS has one thread inside, unless a product of the fit is worth more.

    A step of the solver hands dozens of tiny vectors to BLAS, whose threads spin meanwhile: on two
    cores the fit of 60 objects takes ten times the processor's time with both of them. The limit is
    the process's: probes in several threads at once may leave one.
    """
    if multiplications > _WORTH_THREADS:
        return nullcontext()
    return _libraries().limit(limits=1, user_api="blas")


@cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # scikit-learn, which needs it, has loaded them by then


def _array(x: Tensor, name: str) -> np.ndarray:
    array = x.detach().double().cpu().numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return array
