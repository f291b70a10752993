"""From the units' results to what they say: paired differences, their intervals, a headline."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

from prereg_kernels.demo.data.scenes import PROPERTIES
from prereg_kernels.demo.experiment.experiment import TRANSFERS

Result = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float  # NaN for a single seed

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From one value a seed."""
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), deviation)


@dataclass(frozen=True)
class Effect:
    """Two variants, paired by seed.

    Attributes:
        before, after: each one's spread. difference: after - before, over the seeds.
        half_width: of the 95% t interval of the mean difference; NaN for a single seed.
        p_value: two-sided, of the paired t test: below 0.05 where the interval excludes 0. NaN for
            a single seed.
    """

    before: Spread
    after: Spread
    difference: Spread
    half_width: float
    p_value: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Effect:
        """From one value a seed of each variant, in the same order."""
        from scipy.stats import ttest_rel

        spread = Spread.of([b - a for a, b in zip(before, after, strict=True)])
        half = p_value = math.nan
        if spread.deviation == 0:  # scipy's interval is NaN
            half, p_value = 0.0, float(spread.mean == 0)
        elif len(before) > 1:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Precision loss")  # differences all but equal
                test = ttest_rel(after, before)
            low, high = test.confidence_interval(0.95)
            half, p_value = float(high - low) / 2, float(test.pvalue)
        return cls(Spread.of(before), Spread.of(after), spread, half, p_value)

    @property
    def direction(self) -> int:
        """1 or -1 where the interval of the difference excludes 0, else 0."""
        clear = abs(self.difference.mean) > self.half_width  # False for NaN
        return 0 if not clear else (1 if self.difference.mean > 0 else -1)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of many tests still reject, when no more than `level` is the chance that any of them
    does so wrongly (Holm 1979). NaN never does."""
    order = sorted(
        (i for i, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__
    )
    rejected = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(order) - rank):
            break
        rejected[i] = True
    return rejected


class Results:
    """All units of an experiment, by variant and in the order of the seeds."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.by_variant: dict[str, list[Result]] = {}
        for result in sorted(results, key=lambda r: r["seed"]):
            self.by_variant.setdefault(result["variant"], []).append(result)
        self.seeds = [result["seed"] for result in self.by_variant["baseline"]]

    def values(self, variant: str, get: Callable[[Result], float]) -> list[float]:
        """One value a seed."""
        return [get(result) for result in self.by_variant[variant]]

    def effect(
        self, get: Callable[[Result], float], before: str = "baseline", after: str = "pre"
    ) -> Effect:
        """`after` against `before`."""
        return Effect.of(self.values(before, get), self.values(after, get))

    @property
    def families(self) -> list[str]:
        """The common question families."""
        return list(self.by_variant["baseline"][0]["accuracy"])

    @property
    def layers(self) -> int:
        """How many layers were measured, the input included."""
        return len(self.by_variant["baseline"][0]["probe"]["digit"])


def at(*keys: str | int) -> Callable[[Result], Any]:
    """What stands in a result under these keys, one inside the other."""
    return lambda result: reduce(getitem, keys, result)  # type: ignore[arg-type]


def unasked(layer: int) -> Callable[[Result], float]:
    """The mean probe accuracy of the attributes that no question asks for, at a layer."""
    return lambda r: statistics.fmean(r["probe"][name][layer] for name in PROPERTIES[1:])


def headline(results: Results, layer: int) -> list[str]:
    """What was found, in sentences made from the numbers.

    Args:
        layer: the regularised one.
    """
    last = results.layers - 1
    single = "One seed: the differences below have no interval, and decide nothing."
    loss = Effect.of(
        results.values("baseline", unasked(0)), results.values("baseline", unasked(layer))
    )
    kept = results.effect(unasked(layer))
    sentences = [
        f"Without PRe, what the questions never ask for {_moves(loss)} on the way from the input "
        f"to layer {layer}: {_points(loss)} by linear probes.",
        f"With PRe, layer {layer} {_compares(kept)}: {_points(kept)}"
        + (f"; at the last layer {_points(results.effect(unasked(last)))}." if last else "."),
        _control_sentence(results, layer),
        _sentence(
            "On answers to the common questions, PRe",
            results.effect(at("mean_accuracy")),
            ("is better", "is worse", "makes no clear difference"),
        ),
    ]
    first = results.by_variant["baseline"][0]["transfer"][TRANSFERS[0]]
    family, chance = first["family"], first["majority"]
    for transfer in TRANSFERS:
        effect = results.effect(at("transfer", transfer, "accuracy"))
        sentences.append(
            _sentence(
                f"Learning {family} questions afterwards with {transfer} (always the commonest "
                f"answer: {100 * chance:.1f}%), the PRe model",
                effect,
                ("is better", "is worse", "is not clearly different"),
            )
        )
    return [single, *sentences] if len(results.seeds) == 1 else sentences


def _control_sentence(results: Results, layer: int) -> str:
    control = results.effect(unasked(layer), after="other_scene")
    rest = results.effect(unasked(layer), before="other_scene", after="pre")
    verdict = {1: "content matters", -1: "the control does better", 0: "not clearly apart"}
    return (
        f"A target from another scene: {_points(control)}; the right target against it "
        f"{_difference(rest)} points ({verdict[rest.direction]})."
    )


def _sentence(subject: str, effect: Effect, words: tuple[str, str, str]) -> str:
    better, worse, unclear = words
    verdict = {1: better, -1: worse, 0: unclear}[effect.direction]
    return f"{subject} {verdict}: {_points(effect)}."


def _moves(effect: Effect) -> str:
    return {
        1: "becomes easier to read",
        -1: "becomes harder to read",
        0: "is not clearly harder to read",
    }[effect.direction]


def _compares(effect: Effect) -> str:
    return {1: "keeps more of it", -1: "keeps less of it", 0: "is not clearly different"}[
        effect.direction
    ]


def _points(effect: Effect) -> str:
    """Accuracies in %, and their difference in points with its 95% interval."""
    return (
        f"{100 * effect.before.mean:.1f} to {100 * effect.after.mean:.1f}% "
        f"({_difference(effect)} points)"
    )


def _difference(effect: Effect) -> str:
    interval = "" if math.isnan(effect.half_width) else f" ± {100 * effect.half_width:.1f}"
    return f"{100 * effect.difference.mean:+.1f}{interval}"
