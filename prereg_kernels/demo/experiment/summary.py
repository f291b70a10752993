# SPDX-License-Identifier: Apache-2.0
"""From the units' results to what they say: paired differences, their intervals, a headline."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from typing import Any

from prereg_kernels.checkup.intervals import Estimate
from prereg_kernels.checkup.measures.measure import DEMO, STATES, STRUCTURE, Measure
from prereg_kernels.checkup.measures.table import MEASURES
from prereg_kernels.checkup.words import plus_minus, verdict
from prereg_kernels.demo.config import TRAINED
from prereg_kernels.demo.data.scenes import PROPERTIES

Result = dict[str, Any]


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed; NaN for the deviation of a single one."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), deviation=deviation)


@dataclass(frozen=True)
class Effect:
    """Two variants, paired by seed.

    Attributes:
        before, after: each one's mean over seeds.
        difference: after - before, with its 95% t interval; none for a single seed.
        p_value: two-sided, of the paired t test: below 0.05 where the interval excludes 0. NaN for
            a single seed.
    """

    before: Estimate
    after: Estimate
    difference: Estimate
    p_value: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Effect:
        """From one value a seed of each variant, in the same order."""
        from scipy.stats import ttest_rel

        mean = over_seeds([b - a for a, b in zip(before, after, strict=True)])
        half = p_value = math.nan
        if mean.deviation == 0:  # scipy's interval is NaN
            half, p_value = 0.0, float(mean.value == 0)
        elif len(before) > 1:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Precision loss")  # differences all but equal
                test = ttest_rel(after, before)
            low, high = test.confidence_interval(0.95)
            half, p_value = float(high - low) / 2, float(test.pvalue)
        difference = replace(mean, low=mean.value - half, high=mean.value + half)
        return cls(over_seeds(before), over_seeds(after), difference, p_value)


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

    def measures(self) -> list[Measure]:
        """The measures that all units have."""
        return measures_in((r for group in self.by_variant.values() for r in group), DEMO)

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
    def transfers(self) -> list[tuple[str, str]]:
        """What was frozen, and how many scenes there were, of the transfer tests."""
        first = self.by_variant["baseline"][0]["transfer"]
        return [(frozen, scenes) for frozen, by_scenes in first.items() for scenes in by_scenes]

    @property
    def new_families(self) -> list[str]:
        """The question families of the transfer tests."""
        frozen, scenes = self.transfers[0]
        return list(self.by_variant["baseline"][0]["transfer"][frozen][scenes])

    def commonest(self, frozen: str, scenes: str) -> float:
        """The accuracy of always the commonest answer there, a mean over families and seeds."""
        return statistics.fmean(self.values("baseline", learned(frozen, scenes, "majority")))

    @property
    def layers(self) -> int:
        """How many layers were measured, the input included."""
        return len(self.by_variant["baseline"][0]["probe"]["digit"])


def learned(
    frozen: str, scenes: int | str | None, name: str = "accuracy"
) -> Callable[[Result], float]:
    """A transfer test's accuracy, a mean over its families.

    Args:
        frozen: one of `FROZEN`.
        scenes: how many, None where each was new.
        name: "accuracy", "majority" (of always the commonest answer) or "lm_loss".
    """

    def get(result: Result) -> float:
        families = result["transfer"][frozen][str(scenes)]
        return statistics.fmean(answers[name] for answers in families.values())

    return get


def measures_in(results: Iterable[Result], place: str) -> list[Measure]:
    """The table's measures of a place that all results have, those of patch structure first: older
    results lack newer measures."""
    groups = (STRUCTURE, STATES)
    results = list(results)
    shown = [
        measure
        for measure in MEASURES
        if place in measure.shown
        and all(measure.name in result.get(measure.group, ()) for result in results)
    ]
    return sorted(shown, key=lambda measure: groups.index(measure.group))


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
    gain = results.effect(unasked(layer))
    moves = verdict(
        loss.difference, "becomes easier to read", "becomes harder to read",
        "is not clearly harder to read",
    )  # fmt: skip
    compares = verdict(
        gain.difference, "keeps more of it", "keeps less of it", "is not clearly different"
    )
    sentences = [
        f"Without PRe, what the questions never ask for {moves} on the way from the input "
        f"to layer {layer}: {_points(loss)} by linear probes.",
        f"With PRe, layer {layer} {compares}: {_points(gain)}"
        + (f"; at the last layer {_points(results.effect(unasked(last)))}." if last else "."),
        _control_sentence(results, layer),
        _sentence(
            "On answers to the common questions, PRe",
            results.effect(at("mean_accuracy")),
            "makes no clear difference",
        ),
    ]
    families = ", ".join(results.new_families)
    for frozen, scenes in results.transfers:
        sentences.append(
            _sentence(
                f"Learning new kinds of question ({families}) afterwards from {scenes} scenes, "
                f"{TRAINED[frozen]} (always the commonest answer: "
                f"{100 * results.commonest(frozen, scenes):.1f}%), the PRe model",
                results.effect(learned(frozen, scenes)),
                "is not clearly different",
            )
        )
    return [single, *sentences] if len(results.seeds) == 1 else sentences


def _control_sentence(results: Results, layer: int) -> str:
    control = results.effect(unasked(layer), after="other_scene")
    rest = results.effect(unasked(layer), before="other_scene", after="pre").difference
    words = verdict(rest, "content matters", "the control does better", "not clearly apart")
    return (
        f"A target from another scene: {_points(control)}; the right target against it "
        f"{plus_minus(rest, 100, '.1f')} points ({words})."
    )


def _sentence(subject: str, effect: Effect, unclear: str) -> str:
    words = verdict(effect.difference, "is better", "is worse", unclear)
    return f"{subject} {words}: {_points(effect)}."


def _points(effect: Effect) -> str:
    """Accuracies in %, and their difference in points with its 95% interval."""
    return (
        f"{100 * effect.before.value:.1f} to {100 * effect.after.value:.1f}% "
        f"({plus_minus(effect.difference, 100, '.1f')} points)"
    )
