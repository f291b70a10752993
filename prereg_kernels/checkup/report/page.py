# SPDX-License-Identifier: Apache-2.0
"""The checkup's page and its JSON: everything in one file that needs no network."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import write_whole
from prereg_kernels.checkup.measures.table import MEASURES
from prereg_kernels.checkup.report.findings import (
    comparison,
    headline,
    headline_of_two,
    limits,
    middle_layer,
    notes,
    sentences,
    tiles_of,
)
from prereg_kernels.checkup.report.html import write_html
from prereg_kernels.checkup.report.maps import drawable, maps
from prereg_kernels.checkup.report.pictures import Drawing, draw_all
from prereg_kernels.checkup.report.plots import CURVES, Colours
from prereg_kernels.checkup.results import CheckupResults, Curve
from prereg_kernels.checkup.words import figure

PAGE, NUMBERS, PLOTS = "checkup.html", "checkup.json", "plots"


def write_page(
    out: Path,
    models: Sequence[CheckupResults],
    differences: Mapping[str, Curve],
    facts: Mapping[str, Any],
    pixels: Mapping[str, tuple[int, int]],
) -> Path:
    """Write checkup.json, plots/ and checkup.html into `out`.

    Args:
        models: one model, or two to compare.
        differences: second - first, if there are two.
        facts: what was measured, on what: for the page's first lines.
        pixels: {name of an image: where the patch is whose maps are drawn}, as `report` takes it.

    Returns:
        The page.
    """
    out.mkdir(parents=True, exist_ok=True)
    numbers = as_json(models, differences, facts)
    write_whole(out / NUMBERS, json.dumps(numbers, indent=1, allow_nan=False))
    with warnings.catch_warnings():
        # names of models and images in scripts that the font does not have
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        pictures = draw_all(partial(_drawings, models, pixels), out / PLOTS)
    measured = models[0].measured
    values = {
        "headline": numbers["headline"],
        "tiles": tiles_of(models),
        "sentences": [model["findings"] for model in numbers["models"]],
        "comparison": numbers["comparison"],
        "facts": facts,
        "models": models,
        "notes": notes(models),
        "layer": middle_layer(models[0].layers),
        "pictures": pictures,
        "shown": {
            i: shown.name for i, shown in enumerate(measured.shown()) if f"maps-{i}" in pictures
        },
        "tables": [_table(model) for model in models],
        "limits": limits(
            models[0].layers, len(measured.names), measured.sample_rows, measured.width
        ),
        "skipped": measured.skipped,
    }
    write_html(out / PAGE, __package__, values)
    return out / PAGE


def as_json(
    models: Sequence[CheckupResults], differences: Mapping[str, Curve], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything on the page as plain values; None where a number does not exist.

    {"facts", "headline": of the one model or of the comparison, "comparison": its sentences,
    "models": [{"name", "headline", "findings": its sentences, "layers", "images", "patches",
    "skipped", "notes",
    "curves": {measure: {"value", "low", "high": a number a layer}}, "changes": the same since layer
    0, "probes": {target: {"chance", "accuracies": [layer][split]}}, "missing": {target: reason},
    "top_tokens": [layer][{"token", "id", "share"}], "massive_dimensions": [layer][{"dimension",
    "tokens": that have a massive activation there, "largest": magnitude}]}],
    "differences": as curves, second - first}
    """
    return {
        "facts": dict(facts),
        "headline": headline_of_two(models[0], models[1], differences)
        if len(models) == 2
        else headline(models[0]),
        "comparison": comparison(models[0], models[1], differences) if len(models) == 2 else [],
        "models": [
            {
                "name": d.name,
                "headline": headline(d),
                "findings": sentences(d),
                "layers": d.layers,
                "middle_layer": middle_layer(d.layers),
                "images": len(d.measured.names),
                "patches": int(d.measured.tokens.sum()),
                "width": d.measured.width,
                "sampled_patches": d.measured.sample_rows,
                "skipped": d.measured.skipped,
                "notes": list(d.notes),
                "curves": _curves(d.curves),
                "changes": _curves(d.changes),
                "probes": {
                    target: {
                        "chance": probes[0].chance,
                        "accuracies": [list(p.accuracies) for p in probes],
                    }
                    for target, probes in d.probes.items()
                },
                "missing": dict(d.missing),
                "top_tokens": [
                    [
                        {
                            "token": d.tokens[word.token],
                            "id": word.token,
                            "share": word.times / int(d.measured.tokens.sum()),
                        }
                        for word in lens.most_frequent
                    ]
                    for lens in d.lenses
                ],
                "massive_dimensions": [
                    [dimension._asdict() for dimension in norms.massive_dimensions]
                    for norms in d.norms
                ],
            }
            for d in models
        ],
        "differences": _curves(differences),
    }


def _curves(curves: Mapping[str, Curve]) -> dict[str, dict[str, list[float | None]]]:
    return {
        key: {name: [_number(getattr(x, name)) for x in curve] for name in ("value", "low", "high")}
        for key, curve in curves.items()
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drawings(
    models: Sequence[CheckupResults], pixels: Mapping[str, tuple[int, int]], colours: Colours
) -> Iterator[tuple[str, Drawing]]:
    for picture, draw in CURVES.items():
        drawing = draw(models, colours)
        if drawing is not None:
            yield picture, drawing
    for i, shown in enumerate(zip(*(d.measured.shown() for d in models), strict=True)):
        if all(drawable(image) for image in shown):
            yield f"maps-{i}", maps(models, shown, colours, pixels.get(shown[0].name))


def _table(d: CheckupResults) -> dict[str, Any]:
    """The figures of all layers as text: {"columns", "rows"}."""
    keys = [key for key in d.curves if d.curves[key]]
    units = {measure.name: measure.unit for measure in MEASURES} | dict.fromkeys(d.probes, "%")
    rows = [[key, *(figure(x.value, units[key]) for x in d.curves[key])] for key in keys]
    columns = ["", *("input" if i == 0 else str(i) for i in range(d.layers))]
    return {"columns": columns, "rows": rows}
