# SPDX-License-Identifier: Apache-2.0
"""From what was measured to curves over depth: each number with its interval, models paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prereg_kernels.checkup.intervals import Bootstrap, Estimate, Sums, over_splits
from prereg_kernels.checkup.measured import TEST_SHARE, Measured
from prereg_kernels.checkup.measures.lens import Lens
from prereg_kernels.checkup.measures.measure import CHECKUP, Counted, Measure, PerImage, Sampled
from prereg_kernels.checkup.measures.norms import Norms
from prereg_kernels.checkup.measures.probe import Probe
from prereg_kernels.checkup.measures.sources import LENS, NORMS
from prereg_kernels.checkup.measures.table import MEASURES

Curve = list[Estimate]
"""An estimate a layer."""

Formula = Callable[[Sums], NDArray[np.float64]]


@dataclass(frozen=True)
class CheckupResults:
    """One model's numbers, a value a layer in every list.

    Attributes:
        name: of the model, for people.
        curves: {measure: estimates}; those of one sample of patches have no interval.
        changes: {measure: estimates of the change since layer 0}, where images can be resampled.
        probes: {target: probes}; missing: {target: why there is none}.
        lenses, norms: per layer.
        tokens: {id: what the tokenizer calls it}, for the lenses' lists.
        measured: where all this comes from.
        notes: for the reader.
    """

    name: str
    curves: Mapping[str, Curve]
    changes: Mapping[str, Curve]
    probes: Mapping[str, list[Probe]]
    missing: Mapping[str, str]
    lenses: Sequence[Lens]
    norms: Sequence[Norms]
    tokens: Mapping[int, str]
    measured: Measured
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """L + 1, the input included."""
        return self.measured.layers


def results_of(
    name: str,
    measured: Measured,
    tokenizer: Any = None,
    notes: Sequence[str] = (),
    done: Callable[[], None] = lambda: None,
) -> CheckupResults:
    """All numbers of one model.

    Args:
        tokenizer: names the top tokens; None shows their ids.
        done: called after each layer of each slow measure.
    """
    bootstrap = Bootstrap(len(measured.names))
    resampled = _resampled(measured)
    records: dict[object, list[Any]] = {}
    for source in dict.fromkeys(measure.source for measure in _shown()):
        if not isinstance(source, PerImage):
            records[source] = measured.records(source, done)
    probes, missing = measured.probes(done)

    def without_interval(kind: type) -> dict[str, Curve]:
        return {
            m.name: [Estimate(float(m.value(record))) for record in records[m.source]]
            for m in _shown()
            if isinstance(m.source, kind)
        }

    curves = {
        **{key: bootstrap.estimate(*parts) for key, parts in resampled.items()},
        **without_interval(Sampled),
        **{
            target: [over_splits(p.accuracies, TEST_SHARE) for p in layers]
            for target, layers in probes.items()
        },
        **without_interval(Counted),
    }
    changes = {
        key: bootstrap.estimate(sums, _since_input(formula))
        for key, (sums, formula) in resampled.items()
    }
    for target, layers in probes.items():
        changes[target] = [probe_change(layers[0], p) for p in layers]
    lenses = records[LENS]
    tokens = {word.token: _word(tokenizer, word.token) for lens in lenses for word in lens[2]}
    notes = (*notes, *measured.gaps())
    return CheckupResults(
        name, curves, changes, probes, missing, lenses, records[NORMS], tokens, measured, notes
    )


def differences(first: CheckupResults, second: CheckupResults) -> dict[str, Curve]:
    """second - first at each layer, paired by image, or by split of the same images.

    Raises:
        ValueError: they were not measured on the same images, or have other depths or other
            numbers of tokens of an image.
    """
    a, b = first.measured, second.measured
    if a.names != b.names:
        raise ValueError(
            f"compare: expected two models measured on the same images; {first.name} used "
            f"{len(a.names)}, {second.name} {len(b.names)}"
        )
    for name, of_first, of_second in zip(a.names, a.tokens, b.tokens, strict=True):
        if of_first != of_second:
            raise ValueError(
                f"compare: expected two models with as many tokens of each image; of {name} "
                f"{first.name} has {of_first}, {second.name} {of_second}"
            )
    if a.layers != b.layers:
        raise ValueError(
            f"compare: expected models of the same depth, got {a.layers - 1} and {b.layers - 1} "
            "layers"
        )
    curves: dict[str, Curve] = {}
    bootstrap = Bootstrap(len(a.names))
    before, after = _resampled(a), _resampled(b)
    for key in (key for key in before if key in after):
        (x, formula), (y, _) = before[key], after[key]
        both = {f"0 {k}": v for k, v in x.items()} | {f"1 {k}": v for k, v in y.items()}

        def difference(sums: Sums, formula: Formula = formula) -> NDArray[np.float64]:
            parts = [
                formula({k[2:]: v for k, v in sums.items() if k[0] == which}) for which in "01"
            ]
            return parts[1] - parts[0]

        curves[key] = bootstrap.estimate(both, difference)
    for target in (target for target in first.probes if target in second.probes):
        pairs = zip(first.probes[target], second.probes[target], strict=True)
        curves[target] = [probe_change(p, q) for p, q in pairs]
    return curves


def mean_probe(probes: Mapping[str, Sequence[Probe]], targets: Sequence[str]) -> list[Probe]:
    """The targets' accuracies averaged split by split; their splits are the same."""
    means = []
    for layer in zip(*(probes[target] for target in targets), strict=True):
        accuracies = tuple(np.mean([p.accuracies for p in layer], axis=0).tolist())
        mean, chance = float(np.mean(accuracies)), float(np.mean([p.chance for p in layer]))
        means.append(Probe(mean, math.nan, chance, accuracies))
    return means


def probe_change(before: Probe, after: Probe) -> Estimate:
    """after - before, paired by split."""
    pairs = zip(before.accuracies, after.accuracies, strict=True)
    return over_splits([b - a for a, b in pairs], TEST_SHARE)


def _shown() -> list[Measure]:
    return [measure for measure in MEASURES if CHECKUP in measure.shown]


def _resampled(measured: Measured) -> dict[str, tuple[Sums, Formula]]:
    """The measures that are read from sums over images: {measure: (the sums, the formula)}."""
    sums: dict[PerImage, Sums | None] = {}
    formulas: dict[str, tuple[Sums, Formula]] = {}
    for measure in _shown():
        source = measure.source
        if isinstance(source, PerImage):
            if source not in sums:
                sums[source] = measured.sums(source)
            of_images = sums[source]
            if of_images is not None:
                formulas[measure.name] = of_images, _formula(measure, source)
    return formulas


def _formula(measure: Measure, source: PerImage) -> Formula:
    return lambda sums: measure.value(source.read(sums))


def _since_input(formula: Formula) -> Formula:
    def change(sums: Sums) -> NDArray[np.float64]:
        values = formula(sums)
        return values - values[..., :1]

    return change


def _word(tokenizer: Any, token: int) -> str:
    if tokenizer is None:
        return f"#{token}"
    text = tokenizer.decode([token])
    return (
        text
        if text.strip() and "\ufffd" not in text
        else str(tokenizer.convert_ids_to_tokens(token))
    )
