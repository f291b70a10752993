"""What the numbers say, in sentences that say no more than their intervals allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prereg_kernels.checkup.intervals import Estimate
from prereg_kernels.checkup.results import Curve, Diagnosis, mean_probe, probe_change


@dataclass(frozen=True)
class Tile:
    """A number of the page's first row: what it is, at the input and at the middle layer."""

    title: str
    before: str
    after: str
    note: str
    direction: int = 0  # of the change, where its interval excludes 0


MINUS = "−"

LEVELS = ("image", "object")
"""What a row of a probe's features is."""


def middle_layer(layers: int) -> int:
    """The layer that the sentences speak of: L // 2, where the paper puts PRe. It is fixed before
    anything is measured: the worst of many layers would be picked for its noise too."""
    return (layers - 1) // 2


def headline(found: Diagnosis) -> str:
    """The most important sentence."""
    layer = middle_layer(found.layers)
    parts = []
    for level, targets in _levels(found):
        probes = mean_probe(found.probes, targets)
        verb = _verb(probe_change(probes[0], probes[layer]))
        before, after = 100 * probes[0].mean, 100 * probes[layer].mean
        parts.append(f"{level} probe accuracy {verb} ({before:.0f} to {after:.0f}%)")
    if _known(found, "contrast", layer):
        centred = _relative(found, "centred difference", layer)
        parts.append(
            f"patch contrast {_relative(found, 'contrast', layer)}, and with the mean patch "
            f"subtracted cohesion minus coupling {centred}"
        )
    if not parts:
        after = found.curves["cosine to input"][layer].value
        parts.append(f"the tokens' cosine to their input goes from 1 to {_fixed(after, 2)}")
    text = "; ".join(parts)
    return f"From the input to layer {layer} of {found.layers - 1}, {text}."


def _levels(found: Diagnosis) -> list[tuple[str, list[str]]]:
    """The levels that were probed, each with its targets."""
    levels = [(level, [t for t in found.probes if t.startswith(level)]) for level in LEVELS]
    return [(level, targets) for level, targets in levels if targets]


def _known(found: Diagnosis, key: str, layer: int) -> bool:
    """Whether a measure exists at the input and at a layer: without pairs of patches, none does."""
    curve = found.curves.get(key)
    return curve is not None and all(math.isfinite(curve[i].value) for i in (0, layer))


def _similar(found: Diagnosis, layer: int) -> tuple[str, Estimate]:
    """The debiased CKA, or, where a single patch outweighs all others and it does not exist, the
    plain one; and which."""
    debiased = found.curves["debiased CKA with input"][layer]
    if math.isfinite(debiased.value):
        return "debiased", debiased
    return "plain", found.curves["CKA with input"][layer]


def _relative(found: Diagnosis, key: str, layer: int) -> str:
    """A change in percent of the value at the input, where it is clear and that is positive."""
    before, after = (found.curves[key][i].value for i in (0, layer))
    change = found.changes[key][layer]
    if not change.direction or not before > 0:
        return _verb(change)
    percent = f"{100 * abs(after / before - 1):.0f}%"
    return f"{_verb(change)} {'less than 1%' if percent == '0%' else percent}"


def _verb(change: Estimate) -> str:
    if math.isnan(change.low):
        return "goes up" if change.value > 0 else "goes down"
    return {1: "rises", -1: "falls", 0: "does not clearly change"}[change.direction]


def sentences(found: Diagnosis) -> list[str]:
    """One model's findings, with their intervals."""
    layer = middle_layer(found.layers)
    lines = []
    for level, targets in _levels(found):
        probes = mean_probe(found.probes, targets)
        change = probe_change(probes[0], probes[layer])
        names = ", ".join(target.split(": ", 1)[1] for target in targets)
        mean = f", the mean of {len(targets)}" if len(targets) > 1 else ""
        lines.append(
            f"A linear probe of {level} features ({names}{mean}) is right in "
            f"{100 * probes[0].mean:.1f}% at the input and {100 * probes[layer].mean:.1f}% at "
            f"layer {layer}: {points(change)}, {_verdict(change)}."
        )
    for key, words in (
        ("contrast", "Contrast, cohesion over coupling,"),
        ("centred difference", "Cohesion minus coupling, the mean patch subtracted,"),
    ):
        if _known(found, key, layer):
            curve, change = found.curves[key], found.changes[key][layer]
            lines.append(
                f"{words} is {_fixed(curve[0].value)} at the input and "
                f"{_fixed(curve[layer].value)} at layer {layer}: {number(change)}, "
                f"{_verdict(change)}."
            )
    cosine, cka = found.curves["cosine to input"][layer], found.curves["CKA with input"][layer]
    kind, similar = _similar(found, layer)
    beside = f" (plain {_fixed(cka.value)})" if kind == "debiased" else ""
    lines.append(
        f"At layer {layer} a token's cosine to what entered the LLM is {plain(cosine)}, the {kind} "
        f"CKA of all of them {_fixed(similar.value)}{beside}."
    )
    lens, at_input = found.lenses[layer], found.lenses[0]
    lines.append(
        f"At layer {layer} five words are the logit lens's answer at "
        f"{100 * lens.silenced:.0f}% of the visual tokens (at the input "
        f"{100 * at_input.silenced:.0f}%)."
    )
    return lines


def comparison(first: Diagnosis, second: Diagnosis, differences: Mapping[str, Curve]) -> list[str]:
    """How the second model differs from the first, at the middle layer."""
    layer = middle_layer(first.layers)
    lines = []
    for level in LEVELS:
        targets = [t for t in first.probes if t.startswith(level) and t in second.probes]
        if targets:
            a, b = (mean_probe(found.probes, targets)[layer] for found in (first, second))
            change = probe_change(a, b)
            lines.append(
                f"At layer {layer} a linear probe of {level} features is right in "
                f"{100 * a.mean:.1f}% for {first.name} and {100 * b.mean:.1f}% for {second.name}: "
                f"{points(change)}, {_apart(change)}."
            )
    for key in ("contrast", "centred difference", "cosine to input"):
        if _known(first, key, layer) and _known(second, key, layer):
            x, y = (_fixed(found.curves[key][layer].value) for found in (first, second))
            change = differences[key][layer]
            name = {"centred difference": "cohesion minus coupling, the mean patch subtracted,"}
            lines.append(
                f"At layer {layer} {name.get(key, key)} is {x} for {first.name} and {y} for "
                f"{second.name}: {number(change)}, {_apart(change)}."
            )
    return lines


def tiles(found: Diagnosis) -> list[Tile]:
    """The first row of the page."""
    layer = middle_layer(found.layers)
    row = []
    for level, targets in _levels(found):
        probes = mean_probe(found.probes, targets)
        change = probe_change(probes[0], probes[layer])
        before, after = (f"{100 * probes[i].mean:.0f}%" for i in (0, layer))
        row.append(Tile(f"{level} probe", before, after, _short(change, 100, 1), change.direction))
    for key in ("contrast", "centred difference"):
        if _known(found, key, layer):
            curve, change = found.curves[key], found.changes[key][layer]
            before, after = (_fixed(curve[i].value, 2) for i in (0, layer))
            row.append(Tile(key, before, after, _short(change, 1, 2), change.direction))
    kind, similar = _similar(found, layer)
    note = f"1: nothing changed; {kind}"
    row.append(Tile("CKA with input", "1.00", _fixed(similar.value, 2), note))
    silenced = found.curves["silenced tokens"]
    before, after = (f"{100 * silenced[i].value:.0f}%" for i in (0, layer))
    row.append(Tile("silenced tokens", before, after, "share of five top words"))
    return row


def _short(change: Estimate, scale: float, digits: int) -> str:
    value, low, high = (scale * x for x in (change.value, change.low, change.high))
    text = f"{value:+.{digits}f}"
    if not math.isnan(low):
        text += f" ({low:+.{digits}f} to {high:+.{digits}f})"
    return text.replace("-", MINUS)


def _fixed(value: float, digits: int = 3) -> str:
    """With so many decimals and a real minus sign, but none before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def points(change: Estimate) -> str:
    """A difference of accuracies in percentage points, with its interval."""
    text = f"{100 * change.value:+.1f} points{_range(change, 100, '+.1f')}"
    return text.replace("-", MINUS)


def number(change: Estimate) -> str:
    """A difference with its interval."""
    return f"{change.value:+.3f}{_range(change, 1, '+.3f')}".replace("-", MINUS)


def plain(value: Estimate) -> str:
    """A value with its interval."""
    return f"{value.value:.3f}{_range(value, 1, '.3f')}".replace("-", MINUS)


def reading(layers: int, images: int, rows: int, width: int) -> Sequence[str]:
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


def _range(x: Estimate, scale: float, digits: str) -> str:
    if math.isnan(x.low):
        return ""
    return f" (95% interval {scale * x.low:{digits}} to {scale * x.high:{digits}})"


def _verdict(change: Estimate) -> str:
    if math.isnan(change.low):
        return "with no interval to judge it by"
    return {1: "a rise", -1: "a fall", 0: "no clear change"}[change.direction]


def _apart(change: Estimate) -> str:
    if math.isnan(change.low):
        return "with no interval to judge it by"
    return {1: "higher", -1: "lower", 0: "no clear difference"}[change.direction]
