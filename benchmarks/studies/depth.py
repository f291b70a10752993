# SPDX-License-Identifier: Apache-2.0
"""Where what no question asks is lost, and where PRe keeps it: the demo's model, from its tower on.

    python -m benchmarks.studies.depth --workers 2    # 20 runs on two cores
    python -m benchmarks.studies.depth --table        # prints what is there

Trains the demo's model on paired seeds without PRe and with it, and reads each attribute of a digit
from the mean of its patches, at the tower's output, the projector's and every layer's: by a linear
probe on 256 scenes, by one on 64, as few as the demo's lessons have, and by the attribute's share
of the variance. Every run is written into the results as it ends; what is there is not run again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.report import RESULTS, made_on
from benchmarks.studies.demo_run import BASELINE, demo_run, run_missing
from prereg_kernels._util.machine import describe_machine

OUT = RESULTS / "depth.json"
# {a variant: what differs from the demo's setting}
VARIANTS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "PRe": {},
    "PRe, weight 5": {"weight": 5.0},
    "PRe, pre_llm": {"anchor": "pre_llm"},
}
SEEDS = range(300, 305)  # no other study has them
MANY, FEW, TEST = 256, 64, 256  # scenes
MEASURES = {
    "many": f"linear probe, {MANY} scenes (%)",
    "few": f"linear probe, {FEW} scenes (%)",
    "variance": "share of the variance (%)",
}


def run_config(variant: str, seed: int, steps: int | None = None) -> Any:
    """The demo's run of a variant; `steps`: of the last stage, None: its own."""
    return demo_run(seed, VARIANTS[variant], steps)


def objects(model: Any, scenes: Any, count: int) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Of the digits of `count` scenes: features (O, D) at the tower's output, the projector's and
    every layer's, each attribute's class (O,), and each digit's scene (O,)."""
    from prereg_kernels.checkup import pool
    from prereg_kernels.demo.data.scene_batches import SceneBatches
    from prereg_kernels.demo.measure import layer_features
    from prereg_kernels.demo.model.llava import tower_features

    found = layer_features(model, scenes, count)
    batches = SceneBatches(model, scenes, count)
    pixels = [batches[i].inputs["pixel_values"] for i in range(len(batches))]
    with torch.no_grad():
        tower = torch.cat([tower_features(model, images).float() for images in pixels])
    slots = int(found.owner.max()) + 1
    key = torch.where(found.owner >= 0, found.scene * slots + found.owner, -1)
    of_tower, ids = pool(tower, key)
    return [of_tower, *found.objects], found.labels, ids // slots


def share_of_variance(x: Tensor, labels: Tensor) -> float:
    """Of the variance of x (O, D), the share that lies between the means of the classes."""
    centred = (x - x.mean(0)).double()
    between = sum(
        float(centred[labels == value].mean(0).square().sum() * (labels == value).sum())
        for value in labels.unique()
    )
    return between / float(centred.square().sum())


def train_and_measure(variant: str, seed: int, steps: int | None, cache: str) -> dict[str, Any]:
    """{measure: {attribute: a number for each place, from the tower to the last layer}}."""
    from prereg_kernels.checkup import linear_probe
    from prereg_kernels.demo.loop import train

    torch.set_num_threads(1)
    run = run_config(variant, seed, steps)
    with tempfile.TemporaryDirectory() as out:
        trained = train(run, out, cache_dir=cache, progress=False, tensorboard=False)
    model = trained.model.eval()
    places, labels, scene = objects(model, run.scenes.open("train", seed), MANY)
    test, test_labels, _ = objects(model, run.scenes.open("test", seed), TEST)
    few = scene < FEW
    found: dict[str, Any] = {measure: {} for measure in MEASURES}
    for name, y in labels.items():
        pairs = list(zip(places, test, strict=True))
        found["many"][name] = [linear_probe(x, y, t, test_labels[name]) for x, t in pairs]
        found["few"][name] = [linear_probe(x[few], y[few], t, test_labels[name]) for x, t in pairs]
        found["variance"][name] = [share_of_variance(t, test_labels[name]) for t in test]
    machine = describe_machine(torch.device("cpu"), None)
    return {"variant": variant, "seed": seed, **found, "machine": machine}


def seeds_of(rows: list[dict[str, Any]], variant: str) -> list[int]:
    """Those of its runs that are there."""
    return sorted(row["seed"] for row in rows if row["variant"] == variant)


def values(
    rows: list[dict[str, Any]], variant: str, measure: str, place: int, seeds: list[int]
) -> list[float]:
    """One value a seed: the mean over the attributes that no question asks."""
    found = {row["seed"]: row[measure] for row in rows if row["variant"] == variant}
    return [fmean(v[place] for k, v in found[seed].items() if k != "digit") for seed in seeds]


def place_names(rows: list[dict[str, Any]]) -> list[str]:
    """Of the places that were measured, the tower first."""
    count = len(rows[0]["many"]["digit"])
    return ["tower", "projector", *(f"layer {i}" for i in range(1, count - 1))]


def format_table(stored: dict[str, Any]) -> str:
    """Markdown: each measure at each place, and the paired differences to the baseline."""
    from prereg_kernels.checkup.words import plus_minus
    from prereg_kernels.demo.experiment.summary import Effect, holm

    rows = stored["runs"]
    there = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    names = place_names(rows)
    base_seeds = seeds_of(rows, BASELINE)
    paired = {name: [x for x in seeds_of(rows, name) if x in base_seeds] for name in there}
    effects = {
        (measure, variant, place): Effect.of(
            *(values(rows, x, measure, place, paired[variant]) for x in (BASELINE, variant))
        )
        for measure in MEASURES
        for variant in there[1:]
        for place in range(1, len(names))  # nothing trains the tower
    }
    certain = dict(zip(effects, holm([x.p_value for x in effects.values()]), strict=True))
    lines = []
    for measure, title in MEASURES.items():
        lines += [f"**{title[0].upper()}{title[1:]}**", "", f"| | seeds | {' | '.join(names)} |"]
        lines.append("|---" * (len(names) + 2) + "|")
        base = [fmean(values(rows, BASELINE, measure, i, base_seeds)) for i in range(len(names))]
        cells = [str(len(base_seeds)), *(f"{100 * x:.1f}" for x in base)]
        lines.append(f"| {BASELINE} | {' | '.join(cells)} |")
        for variant in there[1:]:
            cells = [str(len(paired[variant])), ""]
            for place in range(1, len(names)):
                key = measure, variant, place
                mark = " \\*" * bool(certain[key])
                cells.append(plus_minus(effects[key].difference, 100, ".1f") + mark)
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    made = dict.fromkeys(made_on(row["machine"]) for row in rows)
    lines.append(
        f"Means over the attributes that no question asks and over paired seeds, "
        f"{base_seeds[0]} to {base_seeds[-1]}. The first row has levels, the others differences "
        f"to it, and half their 95% t interval. \\*: clear after Holm's correction for all "
        f"{len(effects)}. {'; '.join(made)}."
    )
    return "\n".join(lines)


def plot(stored: dict[str, Any], directory: Path) -> None:
    """`depth-MEASURE.png` for each measure: what nobody asks, and the digit, which is asked."""
    from matplotlib.figure import Figure

    rows = stored["runs"]
    names = [name.removeprefix("layer ") for name in place_names(rows)]
    for measure, title in MEASURES.items():
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        axes = figure.subplots(1, 2)
        for variant in VARIANTS:
            mine = [row for row in rows if row["variant"] == variant]
            if not mine:
                continue
            seeds = seeds_of(rows, variant)
            unasked = [fmean(values(rows, variant, measure, i, seeds)) for i in range(len(names))]
            asked = [fmean(row[measure]["digit"][i] for row in mine) for i in range(len(names))]
            for axis, curve in zip(axes, (unasked, asked), strict=True):
                axis.plot(range(len(names)), [100 * x for x in curve], marker="o", label=variant)
        for axis, what in zip(axes, ("what no question asks", "the digit, asked"), strict=True):
            axis.set_title(what)
            axis.set_xticks(range(len(names)), names)
            axis.set_xlabel("layer")
        axes[0].set_ylabel(title)
        axes[0].legend()
        figure.savefig(directory / f"depth-{measure}.png", dpi=120)


def main() -> None:
    """Run what is missing, or print what is there."""

    def todo(seeds: range) -> list[tuple[str, int]]:
        return [(variant, seed) for seed in seeds for variant in VARIANTS]

    def towers() -> list[Any]:
        return [run_config(BASELINE, SEEDS[0])]

    run_missing(__doc__, SEEDS, OUT, todo, towers, train_and_measure, format_table)


if __name__ == "__main__":
    main()
