# SPDX-License-Identifier: Apache-2.0
"""What the numbers say, in sentences that say no more than their intervals allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prereg_kernels.checkup.intervals import Estimate
from prereg_kernels.checkup.measures.measure import Measure, Reading, Tile
from prereg_kernels.checkup.measures.probe import Probe
from prereg_kernels.checkup.measures.table import MEASURES
from prereg_kernels.checkup.results import CheckupResults, Curve, mean_probe, probe_change
from prereg_kernels.checkup.words import apart, fixed, moved, number, points, short, verb

LEVELS = ("image", "object")
"""What a row of a probe's features is."""


def middle_layer(layers: int) -> int:
    """The layer that the sentences speak of: L // 2, where the paper puts PRe. It is fixed before
    anything is measured: the worst of many layers would be picked for its noise too."""
    return (layers - 1) // 2


def headline(results: CheckupResults) -> str:
    """The most important sentence."""
    layer = middle_layer(results.layers)
    parts = []
    for level, targets in _levels(results):
        probes = mean_probe(results.probes, targets)
        moves = verb(probe_change(probes[0], probes[layer]))
        before, after = 100 * probes[0].mean, 100 * probes[layer].mean
        parts.append(f"{level} probe accuracy {moves} ({before:.0f} to {after:.0f}%)")
    if _known(results, "contrast", layer):
        centred = _relative(results, "centred difference", layer)
        parts.append(
            f"patch contrast {_relative(results, 'contrast', layer)}, and with the mean patch "
            f"subtracted cohesion minus coupling {centred}"
        )
    if not parts:
        after = results.curves["cosine to input"][layer].value
        parts.append(f"the tokens' cosine to their input goes from 1 to {fixed(after, 2)}")
    text = "; ".join(parts)
    return f"From the input to layer {layer} of {results.layers - 1}, {text}."


def headline_of_two(
    first: CheckupResults, second: CheckupResults, differences: Mapping[str, Curve]
) -> str:
    """The most important sentence of a comparison: the second model's number, then the first's."""
    layer = middle_layer(first.layers)
    parts = []
    for level in LEVELS:
        probes = _probes_of_both(first, second, level)
        if probes is not None:
            a, b = probes
            parts.append(
                f"{level} probe accuracy {100 * b.mean:.0f}% against {100 * a.mean:.0f}%, "
                f"{apart(probe_change(a, b))}"
            )
    keys = ["contrast", "centred difference"]
    known = [k for k in keys if all(_known(results, k, layer) for results in (first, second))]
    names = {measure.name: measure.compared for measure in MEASURES}
    for key in known if parts or known else ["cosine to input"]:
        x, y = (fixed(results.curves[key][layer].value) for results in (first, second))
        parts.append(f"{names[key]} {y} against {x}, {apart(differences[key][layer])}")
    text = "; ".join(parts)
    return f"{second.name} against {first.name} at layer {layer} of {first.layers - 1}: {text}."


def _probes_of_both(
    first: CheckupResults, second: CheckupResults, level: str
) -> tuple[Probe, Probe] | None:
    """The mean probes of a level at the middle layer, where both models have some."""
    layer = middle_layer(first.layers)
    targets = [t for t in first.probes if t.startswith(level) and t in second.probes]
    if not targets:
        return None
    a, b = (mean_probe(results.probes, targets)[layer] for results in (first, second))
    return a, b


def _levels(results: CheckupResults) -> list[tuple[str, list[str]]]:
    """The levels that were probed, each with its targets."""
    levels = [(level, [t for t in results.probes if t.startswith(level)]) for level in LEVELS]
    return [(level, targets) for level, targets in levels if targets]


def _known(results: CheckupResults, key: str, layer: int) -> bool:
    """Whether a measure exists at the input and at a layer: without pairs of patches, none does."""
    curve = results.curves.get(key)
    return curve is not None and all(math.isfinite(curve[i].value) for i in (0, layer))


def _readings(results: CheckupResults, layer: int) -> list[tuple[Measure, Reading]]:
    """The measures that exist at the input and at a layer, as sentences read them."""

    def at(key: str) -> Estimate:
        return results.curves[key][layer]

    readings = []
    for measure in MEASURES:
        key = measure.name
        if _known(results, key, layer):
            before, after = results.curves[key][0], at(key)
            change = Estimate(after.value - before.value)
            if key in results.changes:
                change = results.changes[key][layer]
            readings.append((measure, Reading(layer, before, after, change, at)))
    return readings


def _relative(results: CheckupResults, key: str, layer: int) -> str:
    """A change in percent of the value at the input, where it is clear and that is positive."""
    before, after = (results.curves[key][i].value for i in (0, layer))
    change = results.changes[key][layer]
    if not change.direction or not before > 0:
        return verb(change)
    percent = f"{100 * abs(after / before - 1):.0f}%"
    return f"{verb(change)} {'less than 1%' if percent == '0%' else percent}"


def sentences(results: CheckupResults) -> list[str]:
    """One model's findings, with their intervals."""
    layer = middle_layer(results.layers)
    lines = []
    for level, targets in _levels(results):
        probes = mean_probe(results.probes, targets)
        change = probe_change(probes[0], probes[layer])
        names = ", ".join(target.split(": ", 1)[1] for target in targets)
        mean = f", the mean of {len(targets)}" if len(targets) > 1 else ""
        lines.append(
            f"A linear probe of {level} features ({names}{mean}) is right in "
            f"{100 * probes[0].mean:.1f}% at the input and {100 * probes[layer].mean:.1f}% at "
            f"layer {layer}: {points(change)}, {moved(change)}."
        )
    for measure, reading in _readings(results, layer):
        if callable(measure.sentence):
            lines.append(measure.sentence(reading))
        elif measure.sentence is not None:
            lines.append(
                f"{measure.sentence} is {fixed(reading.before.value)} at the input and "
                f"{fixed(reading.after.value)} at layer {layer}: {number(reading.change)}, "
                f"{moved(reading.change)}."
            )
    return lines


def comparison(
    first: CheckupResults, second: CheckupResults, differences: Mapping[str, Curve]
) -> list[str]:
    """How the second model differs from the first, at the middle layer."""
    layer = middle_layer(first.layers)
    lines = []
    for level in LEVELS:
        probes = _probes_of_both(first, second, level)
        if probes is not None:
            a, b = probes
            change = probe_change(a, b)
            lines.append(
                f"At layer {layer} a linear probe of {level} features is right in "
                f"{100 * a.mean:.1f}% for {first.name} and {100 * b.mean:.1f}% for {second.name}: "
                f"{points(change)}, {apart(change)}."
            )
    for measure in MEASURES:
        key = measure.name
        known = all(_known(results, key, layer) for results in (first, second))
        if measure.compared and key in differences and known:
            x, y = (fixed(results.curves[key][layer].value) for results in (first, second))
            change = differences[key][layer]
            lines.append(
                f"At layer {layer} {measure.compared} is {x} for {first.name} and {y} for "
                f"{second.name}: {number(change)}, {apart(change)}."
            )
    return lines


def tiles(results: CheckupResults) -> list[Tile]:
    """One model's part of the page's first row."""
    layer = middle_layer(results.layers)
    row = []
    for level, targets in _levels(results):
        probes = mean_probe(results.probes, targets)
        change = probe_change(probes[0], probes[layer])
        before, after = (f"{100 * probes[i].mean:.0f}%" for i in (0, layer))
        row.append(Tile(f"{level} probe", before, after, short(change, 100, 1), change.direction))
    for measure, reading in _readings(results, layer):
        if measure.tile is not None:
            row.append(measure.tile(measure.name, reading))
    return row


def tiles_of(models: Sequence[CheckupResults]) -> list[tuple[str, list[tuple[str, Tile]]]]:
    """The first row of the page: of each title, the models that have such a tile, and it."""
    row: dict[str, list[tuple[str, Tile]]] = {}
    for model in models:
        for tile in tiles(model):
            row.setdefault(tile.title, []).append((model.name, tile))
    return list(row.items())


def notes(models: Sequence[CheckupResults]) -> list[str]:
    """The models' notes: what all have once, without a name."""
    said = dict.fromkeys(note for model in models for note in model.notes)
    lines = []
    for note in said:
        names = [model.name for model in models if note in model.notes]
        lines.append(note if len(names) == len(models) else f"{names[0]}: {note}")
    return lines


def limits(layers: int, images: int, rows: int, width: int) -> Sequence[str]:
    """What limits the numbers themselves."""
    lines = []
    if images < 30:
        lines.append(
            f"{images} images are few: a bootstrap over them makes intervals too narrow. Use some "
            "hundred."
        )
    if rows < 4 * width:
        lines.append(
            f"Plain CKA, effective dimension and mean correlation come from {rows} patches of "
            f"{width} dimensions: with fewer than about four times as many patches they depend on "
            "the number itself. Compare them at this number only."
        )
    if layers < 3:
        lines.append("A model of one layer has no middle.")
    return lines
