# SPDX-License-Identifier: Apache-2.0
"""Paired effects and the sentences made from them, on numbers with known answers."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from prereg_kernels.demo.data.scenes import PROPERTIES
from prereg_kernels.demo.experiment.summary import (
    Effect,
    Results,
    headline,
    holm,
    over_seeds,
    unasked,
)
from prereg_kernels.demo.experiment.transfer import FROZEN


def test_effect_is_a_paired_t_interval() -> None:
    effect = Effect.of([1.0, 2.0, 3.0], [2.0, 3.5, 4.0])
    assert effect.difference.value == pytest.approx(3.5 / 3)
    assert effect.difference.deviation == pytest.approx(statistics.stdev([1.0, 1.5, 1.0]))
    # t(0.975, 2 degrees of freedom) = 4.302653
    expected = 4.302653 * statistics.stdev([1.0, 1.5, 1.0]) / math.sqrt(3)
    assert effect.difference.half_width == pytest.approx(expected, rel=1e-6)
    assert effect.difference.direction == 1
    assert Effect.of([2.0, 3.5, 4.0], [1.0, 2.0, 3.0]).difference.direction == -1
    assert Effect.of([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]).difference.direction == 0


def test_the_p_value_and_the_interval_agree() -> None:
    # t = 5 / (sqrt(3) * 1 / sqrt(4)) = 5.773503, three degrees of freedom: 2 * sf = 0.010339
    effect = Effect.of([0.0] * 4, [5 - 1.5, 5 - 1.5, 5 + 1.5, 5 + 1.5])
    assert effect.p_value == pytest.approx(0.010339, abs=1e-5)
    at_the_edge = Effect.of(
        [0.0] * 4, [x + effect.difference.half_width - 5 for x in (3.5, 3.5, 6.5, 6.5)]
    )
    assert at_the_edge.p_value == pytest.approx(0.05)
    assert Effect.of([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert Effect.of([1.0, 2.0], [2.0, 3.0]).p_value == 0.0
    assert math.isnan(Effect.of([1.0], [2.0]).p_value)


@pytest.mark.filterwarnings("error")
def test_differences_that_are_equal_or_all_but() -> None:
    """0.3 - 0.2 and 0.8 - 0.7 differ in the last digit: scipy would warn, or find NaN."""
    effect = Effect.of([0.2, 0.7], [0.3, 0.8])
    assert (
        effect.difference.half_width < 1e-14
        and effect.p_value < 1e-14
        and effect.difference.direction == 1
    )
    equal = Effect.of([1.0, 2.0], [2.0, 3.0])
    assert equal.difference.half_width == 0 and equal.difference.direction == 1
    assert Effect.of([1.0, 2.0], [1.0, 2.0]).difference.direction == 0


def test_holm_steps_down() -> None:
    # 0.05 / 4, / 3, / 2: the third fails, and with it the fourth, which alone would pass
    assert holm([0.012, 0.049, 0.03, 0.016]) == [True, False, False, True]
    assert holm([0.04, math.nan]) == [True, False]
    assert holm([0.03, 0.03]) == [False, False]
    assert holm([]) == []


def test_a_single_seed_decides_nothing() -> None:
    effect = Effect.of([0.1], [0.9])
    assert effect.difference.direction == 0
    assert math.isnan(effect.difference.half_width)
    assert over_seeds([0.1]).value == pytest.approx(0.1)


def result(seed: int, variant: str, kept: float, answers: float, moved: float) -> dict[str, Any]:
    """A result whose unasked probes are 1.0 at the input and `kept` at the later two layers."""
    probe = {name: [1.0, kept, kept] for name in PROPERTIES}
    found: dict[str, Any] = {
        "seed": seed,
        "variant": variant,
        "probe": probe,
        "accuracy": {"count": answers},
        "mean_accuracy": answers,
    }
    families = {
        "tilt": {"accuracy": moved - 0.1, "majority": 0.30},
        "texture": {"accuracy": moved + 0.1, "majority": 0.42},
    }
    found["transfer"] = {frozen: {"64": families} for frozen in FROZEN}
    return found


def test_headline_follows_the_numbers() -> None:
    rows = []
    for seed in range(3):
        noise = 0.001 * seed
        rows += [
            result(seed, "baseline", 0.80 + noise, 0.70 + 10 * noise, 0.5),
            result(seed, "pre", 0.90 + 2 * noise, 0.70, 0.5 - 0.1 - noise),
            result(seed, "other_scene", 0.80 + noise, 0.70, 0.0),
        ]
    results = Results(reversed(rows))  # type: ignore[arg-type]
    assert results.seeds == [0, 1, 2]
    assert results.values("pre", unasked(1)) == pytest.approx([0.9, 0.902, 0.904])
    loss, kept, control, answers, *transfers = headline(results, layer=1)
    assert "becomes harder to read" in loss and "100.0 to 80.1%" in loss
    assert "keeps more of it" in kept and "80.1 to 90.2% (+10.1" in kept
    assert "content matters" in control
    assert "makes no clear difference" in answers
    assert len(transfers) == len(FROZEN)
    assert all("is worse: 50.0 to 39.9% (-10.1" in sentence for sentence in transfers)
    assert all("(tilt, texture) afterwards from 64 scenes" in sentence for sentence in transfers)
    assert all("commonest answer: 36.0%" in sentence for sentence in transfers)
