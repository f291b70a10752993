"""The linear probe: how well can a linear classifier read a label from features?"""

from __future__ import annotations

import warnings

import numpy as np
from torch import Tensor


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
        ValueError: shapes that do not fit, features that are not finite, a single class.
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
    classes = train_y.unique().numel()
    if classes < 2:
        raise ValueError(f"train_y: expected at least 2 classes, got {classes}")
    scaler = StandardScaler().fit(_array(train_x, "train_x"))
    probe = LogisticRegression(C=strength, max_iter=300)
    with warnings.catch_warnings():  # separable data never converge, and need not
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(scaler.transform(_array(train_x, "train_x")), train_y.cpu().numpy())
    return float(probe.score(scaler.transform(_array(test_x, "test_x")), test_y.cpu().numpy()))


def _array(x: Tensor, name: str) -> np.ndarray:
    array = x.detach().double().cpu().numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return array
