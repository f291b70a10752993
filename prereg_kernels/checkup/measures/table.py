# SPDX-License-Identifier: Apache-2.0
"""All measures: one entry each. The checkup, the checkups during training, the demo and the sweep
read this table; linear probes, which come with the labels of the images, are not in it.

To add one, write an entry. A mean over tokens needs nothing else:

    Measure("largest value", sources.per_token("largest", lambda x, inputs: x.amax(dim=1)))
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

import torch

from prereg_kernels.checkup.measures import sources
from prereg_kernels.checkup.measures.measure import (
    CHECKUP,
    DEMO,
    STATES,
    STRUCTURE,
    Measure,
    Panel,
    Reading,
    Tile,
    Tokens,
)
from prereg_kernels.checkup.words import fixed, plain, short

# The pictures of the checkup, panel by panel.
PANELS = {
    "patches": Panel("structure", "cohesion —, coupling - -", "mean cosine similarity"),
    "contrast": Panel("structure", "contrast", "cohesion / coupling"),
    "difference": Panel("structure", "difference", "cohesion − coupling"),
    "centred patches": Panel("structure", "both, centred", ""),
    "centred difference": Panel("structure", "difference, centred", ""),
    "CKA": Panel("resemblance", "CKA: debiased —, plain - -", "1 = unchanged", top=1.03),
    "cosine": Panel("resemblance", "cosine to the input", "mean cosine", top=1.03),
    "dimension": Panel("resemblance", "effective dimension", "directions", bottom=0),
    "correlation": Panel("resemblance", "correlation of dimensions", "mean |r|", bottom=0),
    "silenced": Panel("tokens", "silenced tokens", "share of visual tokens", bottom=0, top=102),
    "variety": Panel("tokens", "variety of top tokens", "bits", bottom=0),
    "norm": Panel("tokens", "norm", "median length", bottom=0, wide=True),
    "massive": Panel("tokens", "massive activations", "share of visual tokens", bottom=0, reach=1),
}


def _cka(reading: Reading) -> tuple[str, float]:
    """The debiased CKA, or, where a single patch outweighs all others and it does not exist, the
    plain one; and which."""
    debiased = reading.at("debiased CKA with input").value
    if math.isfinite(debiased):
        return "debiased", debiased
    return "plain", reading.at("CKA with input").value


def _left_of_the_input(reading: Reading) -> str:
    kind, similar = _cka(reading)
    cka = reading.at("CKA with input").value
    beside = f" (plain {fixed(cka)})" if kind == "debiased" else ""
    return (
        f"At layer {reading.layer} a token's cosine to what entered the LLM is "
        f"{plain(reading.after)}, the {kind} CKA of all of them {fixed(similar)}{beside}."
    )


def _silenced(reading: Reading) -> str:
    before, after = (100 * x.value for x in (reading.before, reading.after))
    return (
        f"At layer {reading.layer} five words are the logit lens's answer at {after:.0f}% of the "
        f"visual tokens (at the input {before:.0f}%)."
    )


def _change_tile(name: str, reading: Reading) -> Tile:
    before, after = (fixed(x.value, 2) for x in (reading.before, reading.after))
    change = reading.change
    return Tile(name, before, after, short(change, 1, 2), change.direction)


def _cka_tile(name: str, reading: Reading) -> Tile:
    kind, similar = _cka(reading)
    return Tile(name, "1.00", fixed(similar, 2), f"1: nothing changed; {kind}")


def _silenced_tile(name: str, reading: Reading) -> Tile:
    before, after = (f"{100 * x.value:.0f}%" for x in (reading.before, reading.after))
    return Tile(name, before, after, "share of five top words")


_ALONE = frozenset({CHECKUP})
_NO_SWEEP = frozenset({CHECKUP, DEMO})


def _patches(name: str, unit: str, **more: Any) -> Measure:
    value = attrgetter(name.replace(" ", "_"))
    return Measure(name, sources.STRUCTURE, value, unit, group=STRUCTURE, **more)


def _spectrum(name: str, place: int, field: str, **more: Any) -> Measure:
    def value(record: Any) -> float:
        return getattr(record[place], field)

    return Measure(name, sources.SPECTRA, value, shown=_ALONE, **more)


_COSINE = "mean cosine similarity"
MEASURES = (
    _patches("cohesion", _COSINE, panel="patches"),
    _patches("coupling", _COSINE, panel="patches", dashed=True),
    _patches("difference", _COSINE, panel="difference", shown=_NO_SWEEP),
    _patches(
        "contrast", "ratio", panel="contrast", shown=_NO_SWEEP, tile=_change_tile,
        sentence="Contrast, cohesion over coupling,", compared="contrast",
    ),
    _patches("centred cohesion", _COSINE, panel="centred patches", shown=_NO_SWEEP),
    _patches(
        "centred coupling", _COSINE, panel="centred patches", dashed=True, shown=_NO_SWEEP
    ),
    _patches(
        "centred difference", _COSINE, panel="centred difference", tile=_change_tile,
        sentence="Cohesion minus coupling, the mean patch subtracted,",
        compared="cohesion minus coupling, the mean patch subtracted,",
    ),
    _patches("centred contrast", "ratio"),
    Measure(
        "cosine to input", sources.COSINE, shown=_NO_SWEEP, panel="cosine",
        sentence=_left_of_the_input, compared="cosine to input",
    ),
    _spectrum("CKA with input", 1, "cka", panel="CKA", dashed=True, tile=_cka_tile),
    _spectrum("debiased CKA with input", 1, "debiased_cka", panel="CKA"),
    _spectrum("centred cosine to input", 1, "centred_cosine"),
    _spectrum("effective dimension", 0, "effective_dimension", panel="dimension"),
    _spectrum("mean correlation", 0, "mean_correlation", panel="correlation"),
    Measure(
        "silenced tokens", sources.LENS, attrgetter("silenced"), "%", _ALONE, panel="silenced",
        sentence=_silenced, tile=_silenced_tile,
    ),
    Measure(
        "entropy of top tokens", sources.LENS, attrgetter("entropy"), shown=_ALONE, panel="variety"
    ),
    Measure("norm", sources.NORMS, attrgetter("mean"), shown=frozenset({DEMO})),
    Measure("median norm", sources.NORMS, attrgetter("median"), shown=_ALONE, panel="norm"),
    Measure("outlier tokens", sources.NORMS, attrgetter("outliers"), "%", _ALONE),
    Measure(
        "massive activations", sources.NORMS, attrgetter("massive"), "%", _ALONE, panel="massive"
    ),
)  # fmt: skip


def at_layer(tokens: Tokens, place: str) -> dict[str, dict[str, float]]:
    """The measures of a place on features that are all in memory: {group: {measure: number}}."""
    records: dict[int, Any] = {}
    groups: dict[str, dict[str, float]] = {STRUCTURE: {}, STATES: {}}
    with torch.no_grad():
        for measure in MEASURES:
            if place in measure.shown:
                source = id(measure.source)
                if source not in records:
                    records[source] = measure.source.of(tokens)
                groups[measure.group][measure.name] = float(measure.value(records[source]))
    return groups
