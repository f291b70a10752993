# SPDX-License-Identifier: Apache-2.0
"""The linear probe reads what is linear, and nothing where there is nothing."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from prereg_kernels.checkup import NoProbeError, linear_probe, probe


def test_reads_a_linear_label_and_not_a_random_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=generator) * torch.tensor([100.0, 1, 1, 1, 0.01])
    linear = (x[:, 4] > 0).long()  # in a small dimension: needs the standardisation
    random = torch.randint(0, 2, (600,), generator=generator)
    assert linear_probe(x[:400], linear[:400], x[400:], linear[400:]) > 0.97
    assert linear_probe(x[:400], random[:400], x[400:], random[400:]) < 0.6


@pytest.mark.parametrize("columns", [30, 300])  # fewer than rows; solved in the rows' span
def test_equals_logistic_regression_on_standardised_features(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (3000,), generator=generator)
    x = torch.randn(3000, columns, generator=generator)
    x += 0.3 * torch.randn(4, columns, generator=generator)[y] + 2 * x[:, :1] + 5
    mean, deviation = x[:60].double().mean(dim=0), x[:60].double().std(dim=0, correction=0)
    z = ((x - mean) / deviation).numpy()
    direct = LogisticRegression(C=0.3, max_iter=300).fit(z[:60], y[:60])
    expected = direct.score(z[60:], y[60:])
    got = linear_probe(x[:60], y[:60], x[60:], y[60:], strength=0.3)
    assert got == pytest.approx(expected, abs=1 / 2940)
    assert 0.3 < got < 0.97


@pytest.mark.parametrize(("worth", "inside"), [(1e6, 1), (10, 2)])
def test_a_small_fit_has_one_thread(
    monkeypatch: pytest.MonkeyPatch, worth: float, inside: int
) -> None:
    """Two that wait for each other took most of a checkup; afterwards they are what they were."""

    def threads() -> set[int]:
        return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}

    found: list[set[int]] = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(f"{linear_probe.__module__}._WORTH_THREADS", worth)
    monkeypatch.setattr(
        LogisticRegression, "fit", lambda *a, **k: (found.append(threads()), fit(*a, **k))[1]
    )
    x, y = noisy()
    with threadpool_limits(2, "blas"):
        linear_probe(x, y, x, y)
        assert (found, threads()) == ([{inside}], {2})


def noisy(rows: int = 300, columns: int = 6) -> tuple[Tensor, Tensor]:
    """Two classes in the shares 2 : 1 that overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(rows) % 3 == 0).long()
    return torch.randn(rows, columns, generator=generator) + 0.7 * labels[:, None], labels


def test_mean_interval_and_chance() -> None:
    x, y = noisy()
    got = probe(x, y, splits=4, test_share=0.2)
    assert len(got.accuracies) == 4
    assert got.mean == pytest.approx(np.mean(got.accuracies))
    # t of 3 degrees of freedom at 97.5%; the variance of the mean as Nadeau and Bengio correct it
    deviation = np.std(got.accuracies, ddof=1)
    assert got.half_width == pytest.approx(3.182446 * deviation * math.sqrt(1 / 4 + 0.2 / 0.8))
    assert got.interval == (got.mean - got.half_width, got.mean + got.half_width)
    assert got.chance == pytest.approx(2 / 3)
    assert got.chance < got.interval[0] < 1 and got.half_width > 0


def test_deterministic_by_seed() -> None:
    x, y = noisy()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert probe(x, y, seed=1) == probe(x, y, seed=1)
    assert probe(x, y, seed=1).accuracies != probe(x, y, seed=2).accuracies
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_groups_stay_on_one_side() -> None:
    """Labels drawn per group, features that only name the group: a split of rows can cheat."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(60).repeat_interleave(8)
    labels = torch.randint(0, 2, (60,), generator=generator)[groups]
    x = torch.randn(60, 64, generator=generator)[groups]
    x = x + 0.01 * torch.randn(480, 64, generator=generator)
    assert probe(x, labels).mean > 0.95
    assert probe(x, labels, groups=groups).mean < 0.65


def test_a_single_split_has_no_interval() -> None:
    assert math.isnan(probe(*noisy(), splits=1).half_width)


def test_a_class_that_only_the_test_set_has_is_missed() -> None:
    x = torch.eye(3).repeat(4, 1)
    y = torch.arange(3).repeat(4)
    train = y < 2
    assert linear_probe(x[train], y[train], x, y) == pytest.approx(2 / 3)


def test_data_that_do_not_converge_give_no_warning() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator) @ torch.randn(4, 40, generator=generator)
    x = x * torch.logspace(0, -3, 40) + 1e-3 * torch.randn(300, 40, generator=generator)
    y = torch.randint(0, 5, (300,), generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe(x, y, x, y, strength=1e3)


def test_bad_input() -> None:
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="train_y: expected at least 2 classes, got 1"):
        linear_probe(x, torch.zeros(4, dtype=torch.long), x, y)
    with pytest.raises(ValueError, match=r"test_x, test_y: .* got \(4, 2\) and \(3,\)"):
        linear_probe(x, y, x, y[:3])
    with pytest.raises(ValueError, match="train_x: expected finite"):
        linear_probe(x / 0, y, x, y)


def test_bad_splits() -> None:
    x, y = noisy()
    with pytest.raises(ValueError, match="features: expected finite"):
        probe(x / 0, y)
    with pytest.raises(ValueError, match=r"labels: expected shape \(300,\), got \(299,\)"):
        probe(x, y[1:])
    with pytest.raises(NoProbeError, match="labels: expected at least 2 classes, got 1"):
        probe(x, torch.zeros_like(y))
    with pytest.raises(ValueError, match="splits: expected at least 1, got 0"):
        probe(x, y, splits=0)
    with pytest.raises(ValueError, match=r"test_share: .* got 1.0"):
        probe(x, y, test_share=1.0)
    with pytest.raises(NoProbeError, match="groups: expected at least 2 different ones, got 1"):
        probe(x, y, groups=torch.zeros_like(y))
    with pytest.raises(ValueError, match=r"groups: expected shape \(300,\), got \(1,\)"):
        probe(x, y, groups=y[:1])
    rare = (torch.arange(300) == 0).long()
    with pytest.raises(NoProbeError, match="labels: the 150 rows of a training set have a single"):
        probe(x, rare, test_share=0.5, splits=20)
