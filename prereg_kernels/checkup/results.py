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
from prereg_kernels.checkup.measures.norms import Norms
from prereg_kernels.checkup.measures.probe import Probe

Curve = list[Estimate]
"""An estimate a layer."""

Formula = Callable[[Sums], NDArray[np.float64]]


def _mean(name: str, count: str) -> Formula:
    return lambda sums: sums[name] / sums[count]


def _combined(first: Formula, second: Formula, how: Callable[[Any, Any], Any]) -> Formula:
    return lambda sums: how(first(sums), second(sums))


_COHESION, _COUPLING = _mean("cohesion", "within"), _mean("coupling", "between")
_CENTRED_COHESION = _mean("centred cohesion", "within")
_CENTRED_COUPLING = _mean("centred coupling", "between")

STRUCTURE: dict[str, Formula] = {
    "cohesion": _COHESION,
    "coupling": _COUPLING,
    "contrast": _combined(_COHESION, _COUPLING, np.divide),
    "difference": _combined(_COHESION, _COUPLING, np.subtract),
    "centred cohesion": _CENTRED_COHESION,
    "centred coupling": _CENTRED_COUPLING,
    "centred contrast": _combined(_CENTRED_COHESION, _CENTRED_COUPLING, np.divide),
    "centred difference": _combined(_CENTRED_COHESION, _CENTRED_COUPLING, np.subtract),
}
COSINE = "cosine to input"


@dataclass(frozen=True)
class Diagnosis:
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


def diagnose(
    name: str,
    measured: Measured,
    tokenizer: Any = None,
    notes: Sequence[str] = (),
    done: Callable[[], None] = lambda: None,
) -> Diagnosis:
    """All numbers of one model.

    Args:
        tokenizer: names the top tokens; None shows their ids.
        done: called after each layer of each slow measure.
    """
    curves: dict[str, Curve] = {}
    changes: dict[str, Curve] = {}
    bootstrap = Bootstrap(len(measured.names))
    for key, (sums, formula) in _resampled(measured).items():
        curves[key] = bootstrap.estimate(sums, formula)
        changes[key] = bootstrap.estimate(sums, _since_input(formula))
    for spectrum, similar in measured.spectra(done):
        for key, value in (
            ("CKA with input", similar.cka),
            ("debiased CKA with input", similar.debiased_cka),
            ("centred cosine to input", similar.centred_cosine),
            ("effective dimension", spectrum.effective_dimension),
            ("mean correlation", spectrum.mean_correlation),
        ):
            curves.setdefault(key, []).append(Estimate(value))
    probes, missing = measured.probes(done)
    for target, found in probes.items():
        curves[target] = [over_splits(p.accuracies, TEST_SHARE) for p in found]
        changes[target] = [_difference(found[0], p) for p in found]
    lenses, norms = measured.lenses(), measured.token_norms()
    curves["silenced tokens"] = [Estimate(lens.silenced) for lens in lenses]
    curves["entropy of top tokens"] = [Estimate(lens.entropy) for lens in lenses]
    curves["median norm"] = [Estimate(found.median) for found in norms]
    curves["outlier tokens"] = [Estimate(found.outliers) for found in norms]
    curves["massive activations"] = [Estimate(found.massive) for found in norms]
    tokens = {word.token: _word(tokenizer, word.token) for lens in lenses for word in lens[2]}
    notes = (*notes, *measured.unlabelled())
    return Diagnosis(name, curves, changes, probes, missing, lenses, norms, tokens, measured, notes)


def differences(first: Diagnosis, second: Diagnosis) -> dict[str, Curve]:
    """second - first at each layer, paired by image, or by split of the same images.

    Raises:
        ValueError: they were not measured on the same images, or have other depths.
    """
    a, b = first.measured, second.measured
    if a.names != b.names:
        raise ValueError(
            f"compare: expected two models measured on the same images; {first.name} used "
            f"{len(a.names)}, {second.name} {len(b.names)}"
        )
    if a.layers != b.layers:
        raise ValueError(
            f"compare: expected models of the same depth, got {a.layers - 1} and {b.layers - 1} "
            "layers"
        )
    found: dict[str, Curve] = {}
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

        found[key] = bootstrap.estimate(both, difference)
    for target in (target for target in first.probes if target in second.probes):
        pairs = zip(first.probes[target], second.probes[target], strict=True)
        found[target] = [_difference(p, q) for p, q in pairs]
    return found


def mean_probe(probes: Mapping[str, Sequence[Probe]], targets: Sequence[str]) -> list[Probe]:
    """The targets' accuracies averaged split by split; their splits are the same."""
    found = []
    for layer in zip(*(probes[target] for target in targets), strict=True):
        accuracies = tuple(np.mean([p.accuracies for p in layer], axis=0).tolist())
        mean, chance = float(np.mean(accuracies)), float(np.mean([p.chance for p in layer]))
        found.append(Probe(mean, math.nan, chance, accuracies))
    return found


def probe_change(before: Probe, after: Probe) -> Estimate:
    """after - before, paired by split."""
    return _difference(before, after)


def _resampled(measured: Measured) -> dict[str, tuple[Sums, Formula]]:
    """The measures that are ratios of sums over images: {measure: (the sums, the ratio)}."""
    tokens = np.repeat(measured.tokens[:, None].astype(np.float64), measured.layers, axis=1)
    cosine = {"cosine": measured.cosines * tokens, "tokens": tokens}
    found: dict[str, tuple[Sums, Formula]] = {COSINE: (cosine, _mean("cosine", "tokens"))}
    if measured.has_objects:
        within, between = (
            np.repeat(measured.pairs[:, i : i + 1], measured.layers, axis=1) for i in (0, 1)
        )
        sums = {"within": within, "between": between}
        for i, (name, pairs) in enumerate(
            (
                ("cohesion", within),
                ("coupling", between),
                ("centred cohesion", within),
                ("centred coupling", between),
            )
        ):
            sums[name] = np.where(pairs > 0, measured.structure[:, :, i], 0.0) * pairs
        found |= {name: (sums, formula) for name, formula in STRUCTURE.items()}
    return found


def _since_input(formula: Formula) -> Formula:
    def change(sums: Sums) -> NDArray[np.float64]:
        values = formula(sums)
        return values - values[..., :1]

    return change


def _difference(before: Probe, after: Probe) -> Estimate:
    pairs = zip(before.accuracies, after.accuracies, strict=True)
    return over_splits([b - a for a, b in pairs], TEST_SHARE)


def _word(tokenizer: Any, token: int) -> str:
    if tokenizer is None:
        return f"#{token}"
    text = tokenizer.decode([token])
    return (
        text
        if text.strip() and "\ufffd" not in text
        else str(tokenizer.convert_ids_to_tokens(token))
    )
