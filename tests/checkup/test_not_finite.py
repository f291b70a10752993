# SPDX-License-Identifier: Apache-2.0
"""No measure makes a number of NaN or infinity: each says which argument has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prereg_kernels.checkup import (
    Lens,
    MeanSums,
    Norms,
    SimilaritySums,
    StructureSums,
    linear_probe,
    logit_lens,
    patch_structure,
    pool,
    probe,
    similarity,
    spectrum,
    token_norms,
)
from prereg_kernels.checkup.intervals import Bootstrap, over_splits
from prereg_kernels.checkup.measured import Shown
from prereg_kernels.checkup.report.maps import aligned_components

N, D = 40, 8
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
IDS, TWO = torch.arange(N) % 3, torch.arange(N) % 2
WORDS = torch.randn(5, D, generator=torch.Generator().manual_seed(1))


def _same(x: Tensor) -> Tensor:
    return x


def _sums(x: Tensor) -> dict[str, Any]:
    return {"a": x[:, :2].double().numpy()}


def _first(sums: Any) -> Any:
    return sums["a"]


class _Sampled:
    """What maps take of a model's results."""

    measured: Any

    def __init__(self) -> None:
        self.measured = self

    def sample(self, layer: int) -> Tensor:
        return X


def _components(x: Tensor) -> Any:
    shown = Shown("a", x[None], None, None, None, None, None)
    return aligned_components(_Sampled(), shown, [0])  # type: ignore[arg-type]


MEASURES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "structure": ("features", lambda x: patch_structure(x, IDS)),
    "structure's mean": ("mean", lambda x: StructureSums(x[3])),
    "spectrum": ("features", spectrum),
    "similarity": ("features", lambda x: similarity(x, X.to(x))),
    "its reference": ("reference", lambda x: similarity(X.to(x), x)),
    "its means": ("means", lambda x: SimilaritySums((X[0], x[3]))),
    "norms": ("features", token_norms),
    "norms of parts": ("norms", lambda x: Norms.of(x[:, 2], 0, [])),
    "probe": ("features", lambda x: probe(x, TWO)),
    "train": ("train_x", lambda x: linear_probe(x, TWO, X, TWO)),
    "test": ("test_x", lambda x: linear_probe(X, TWO, x, TWO)),
    "mean of groups": ("features", lambda x: pool(x, IDS)),
    "mean": ("features", lambda x: MeanSums().update(x)),
    "lens": ("features", lambda x: logit_lens(x, _same, WORDS.to(x))),
    "lens's words": ("norm, weight, bias", lambda x: logit_lens(X.to(x), _same, x)),
    "bootstrap": ("a", lambda x: Bootstrap(N).estimate(_sums(x[:, 1:]), _first)),
    "splits": ("values", lambda x: over_splits(x[3].tolist(), 0.25)),
    "components": ("patches", _components),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", MEASURES)
def test_the_argument_is_named(name: str, value: float) -> None:
    argument, measure = MEASURES[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = X.to(dtype, copy=True)
        measure(x)
        x[3, 2] = value
        if name == "lens's words" and value == -math.inf:
            x[:, 2] = math.nan  # of one word, it is a word that is never said
        with pytest.raises(ValueError, match=f"^{argument}: expected finite"):
            measure(x)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: spectrum(X[:, :0]), "features: expected at least 1 column, got 0"),
        (lambda: token_norms(X[:, :0]), "features: expected at least 1 column, got 0"),
        (lambda: spectrum(X.to(torch.float8_e4m3fn)), "features: .*float8_e4m3fn; it takes 16"),
        (lambda: patch_structure(X, IDS > 0), "objects: expected integers, got torch.bool"),
        (lambda: StructureSums(X), "mean: expected shape"),
        (lambda: linear_probe(X, TWO * math.nan, X, TWO), "train_y: expected integers"),
        (lambda: linear_probe(X, TWO, X[:, :3], TWO), "test_x: expected at least 1 row of 8 col"),
        (lambda: linear_probe(X, TWO, X[:0], TWO[:0]), "test_x: expected at least 1 row of 8 col"),
        (lambda: linear_probe(X, TWO, X, TWO, strength=math.nan), "strength: expected a number"),
        (lambda: probe(X, TWO, test_share=math.nan), "test_share: expected a share between"),
        (lambda: over_splits([], 0.25), "values: expected finite values, at least 1"),
        (lambda: over_splits([0.5, 0.6], 1.0), "test_share: expected a share between"),
        (lambda: Bootstrap(0), "images: expected at least 1, got 0"),
        (lambda: Lens.of({1: -1, 2: 3}), "times: expected counts, got -1"),
    ],
)
def test_other_arguments_that_have_no_number(
    measure: Callable[[], Iterable[object]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        measure()


def test_a_single_lost_image_is_not_left_out_of_the_interval() -> None:
    """Where most draws had it not, the interval was that of the others."""
    values = np.ones((200, 1))
    values[0] = math.nan
    with pytest.raises(ValueError, match=r"^a: expected finite sums"):
        Bootstrap(200).estimate({"a": values}, lambda sums: sums["a"])
