"""The experiment's pictures, as PNG files. They only read results; nothing is computed here."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prereg_kernels.checkup.measures.measure import STRUCTURE
from prereg_kernels.checkup.report.style import (
    BLUE,
    GREY,
    ORANGE,
    STYLE,
    curve,
    legend,
    mark_layer,
    panels,
)
from prereg_kernels.demo.data.questions import COMMON_FAMILIES, questions
from prereg_kernels.demo.data.scenes import ATTRIBUTES, PROPERTIES, Scenes
from prereg_kernels.demo.experiment.experiment import VARIANTS, ExperimentConfig
from prereg_kernels.demo.experiment.summary import (
    TRAINED,
    Result,
    Results,
    at,
    learned,
    unasked,
)
from prereg_kernels.demo.metrics import read_metrics
from prereg_kernels.demo.training_checkup import read_checkups

LABELS = {"baseline": "baseline", "pre": "PRe", "other_scene": "control: another scene's target"}
COLOURS = {"baseline": ORANGE, "pre": BLUE, "other_scene": GREY}
MARKERS = {"baseline": "s", "pre": "o", "other_scene": "^"}
COLUMNS = 4


def plot_all(
    results: Results, config: ExperimentConfig, out: Path, directory: Path
) -> dict[str, Path]:
    """Draw every picture into `directory`; {name: file}."""
    directory.mkdir(parents=True, exist_ok=True)
    layer = config.run.pre.layer
    files = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in {
            "probes": probes(results, layer),
            "answers": answers(results),
            "transfer": transfer(results),
            "structure": structure(results, layer),
            "training": training(results, out),
            "scenes": scenes(config),
            "progress": progress(results, out, layer),
        }.items():
            if figure is None:
                continue
            files[name] = directory / f"{name}.png"
            figure.savefig(files[name])
    return files


def probes(results: Results, layer: int) -> Figure:
    """Probe accuracy over depth, a panel for each property."""
    figure, axes = panels(len(PROPERTIES), size=(15, 3.1))
    for axis, name in zip(axes, PROPERTIES, strict=True):
        _over_depth(axis, results, at("probe", name), layer, scale=100)
        axis.set_title(f"{name} ({'asked' if name == 'digit' else 'never asked'})")
    axes[0].set_ylabel("linear probe, test accuracy (%)")
    legend(figure, axes[0])
    return figure


def structure(results: Results, layer: int) -> Figure:
    """The measures of patch structure over depth."""
    measures = [m for m in results.measures() if m.group == STRUCTURE]
    rows = -(-len(measures) // COLUMNS)
    figure, axes = panels(len(measures), size=(14, 2.8 * rows), columns=COLUMNS)
    unit = ""
    for i, (axis, measure) in enumerate(zip(axes, measures, strict=True)):
        _over_depth(axis, results, at(measure.group, measure.name), layer, measure.scale)
        axis.set_title(measure.name)
        if i % COLUMNS == 0 or measure.unit != unit:
            axis.set_ylabel(measure.unit)
        unit = measure.unit
    legend(figure, axes[0])
    return figure


def answers(results: Results) -> Figure:
    """Accuracy per question family, a bar a variant, a dot a seed."""
    figure, [axis] = panels(1, size=(9, 3.4))
    families = [*results.families, "mean"]

    def get(family: str) -> Callable[[Result], float]:
        return lambda r: 100 * (r["mean_accuracy"] if family == "mean" else r["accuracy"][family])

    _bars(axis, results, VARIANTS, [(family, get(family)) for family in families])
    for x, family in enumerate(families[:-1]):
        level = 100 * statistics.fmean(r["majority"][family] for r in _all(results))
        axis.hlines(level, x - 0.45, x + 0.45, color="black", linestyle=":", linewidth=1.2)
    axis.set_ylabel("right answers (%)")
    axis.set_ylim(0, 105)
    axis.set_title("answers by greedy generation; dots: seeds; dotted: always the commonest answer")
    legend(figure, axis)
    return figure


def transfer(results: Results) -> Figure:
    """Accuracy on the new question families, per way of learning them."""
    figure, [axis] = panels(1, size=(9, 3.4))

    def get(frozen: str, scenes: str) -> Callable[[Result], float]:
        return lambda r: 100 * learned(frozen, scenes)(r)

    groups = [(TRAINED[frozen], get(frozen, scenes)) for frozen, scenes in results.transfers]
    _bars(axis, results, VARIANTS, groups)
    for x, (frozen, scenes) in enumerate(results.transfers):
        level = 100 * results.commonest(frozen, scenes)
        axis.hlines(level, x - 0.45, x + 0.45, color="black", linestyle=":", linewidth=1.2)
    families, scenes = ", ".join(results.new_families), results.transfers[0][1]
    axis.set_ylabel("right answers (%)")
    axis.set_ylim(0, 105)
    axis.set_title(f"new kinds of question ({families}), learned afterwards from {scenes} scenes")
    legend(figure, axis)
    return figure


def training(results: Results, out: Path) -> Figure:
    """Both losses over the steps, a thin line a seed, smoothed over 10 steps."""
    figure, axes = panels(2, size=(11, 3.2))
    for variant in VARIANTS:
        for position, result in enumerate(results.by_variant[variant]):
            rows = read_metrics(out / f"seed-{result['seed']}" / variant)
            for axis, key in zip(axes, ("lm_loss", "pre_loss"), strict=True):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if len(points) < 10:
                    continue
                steps, values = np.array(points).T
                smooth = np.convolve(values, np.ones(10) / 10, mode="valid")
                label = LABELS[variant] if position == 0 else None
                axis.plot(steps[9:], smooth, color=COLOURS[variant], linewidth=1, label=label)
    axes[0].set(xlabel="step", ylabel="L_LM (nats per answer)", title="language-model loss")
    axes[1].set(xlabel="step", ylabel="L_PRe (negative cosine)", title="PRe loss")
    legend(figure, axes[0])
    return figure


def progress(results: Results, out: Path, layer: int) -> Figure | None:
    """The paper's third figure: what is answered and what probes read, over training. A line a
    variant, the mean of its seeds; None where no checkup was made during training."""
    checkups = {
        variant: [
            rows
            for result in results.by_variant[variant]
            if (rows := read_checkups(out / f"seed-{result['seed']}" / variant))
        ]
        for variant in VARIANTS
    }
    if not any(checkups.values()):
        return None
    figure, axes = panels(3, size=(13, 3.2))
    shown: list[tuple[str, Callable[[Any], float]]] = [
        ("answers to the common questions", at("mean_accuracy")),
        (f"linear probe, layer {layer}: never asked", unasked(layer)),
        (f"linear probe, layer {layer}: digit (asked)", at("probe", "digit", layer)),
    ]
    for variant, seeds in checkups.items():
        if not seeds:
            continue
        steps = [row["step"] for row in seeds[0]]
        for axis, (title, get) in zip(axes, shown, strict=True):
            lines = 100 * np.array([[get(row) for row in rows] for rows in seeds])
            axis.plot(
                steps, lines.mean(axis=0), color=COLOURS[variant], marker=MARKERS[variant],
                markersize=4, label=LABELS[variant],
            )  # fmt: skip
            for line in lines if len(lines) > 1 else ():
                axis.plot(steps, line, color=COLOURS[variant], linewidth=0.6, alpha=0.5)
            axis.set(title=title, xlabel="step")
    axes[0].set_ylabel("right (%)")
    legend(figure, axes[0])
    return figure


def scenes(config: ExperimentConfig, count: int = 6) -> Figure:
    """Test scenes, their object masks, a digit's attributes, and a question of each family."""
    figure, axes = panels(2 * count, size=(2.5 * count, 6.2), columns=count)
    test = Scenes("test", 0, config.run.scenes)
    for column in range(count):
        scene = test.scene(column)
        top, bottom = axes[column], axes[count + column]
        top.imshow(scene.image, cmap="gray", vmin=0, vmax=1)
        bottom.imshow(scene.image, cmap="gray", vmin=0, vmax=1, alpha=0.35)
        bottom.imshow(np.ma.masked_less(scene.mask, 0), cmap="tab10", vmin=0, vmax=9, alpha=0.8)
        first = scene.objects[0]
        box = (first.left - 0.5, first.top - 0.5), first.size, first.size
        top.add_patch(Rectangle(*box, fill=False, edgecolor="#D55E00", linewidth=2.5))
        words = [values[getattr(first, name)] for name, values in ATTRIBUTES.items()]
        top.set_title(f"{first.digit}: {', '.join(words[:2])},\n{', '.join(words[2:])}", fontsize=9)
        rng = random.Random(column)
        examples = [
            questions(scene, {family: 1.0}, 1, rng, grid=config.run.scenes.grid)[0]
            for family in COMMON_FAMILIES
        ]
        lines = [f"{' '.join(question.prompt)}? {question.answer}" for question in examples]
        bottom.set_title("\n".join(lines), fontsize=8, loc="left")
        for axis in (top, bottom):
            axis.set_axis_off()
    return figure


def _over_depth(
    axis: Axes,
    results: Results,
    get: Callable[[Result], list[float]],
    layer: int,
    scale: float = 1,
) -> None:
    mark_layer(axis, layer, color="black", alpha=0.15, linewidth=6)
    for variant in VARIANTS:
        lines = scale * np.array([get(result) for result in results.by_variant[variant]])
        mean = lines.mean(axis=0)
        spread = lines.std(axis=0, ddof=1) if len(lines) > 1 else np.full_like(mean, np.nan)
        curve(
            axis, mean, mean - spread, mean + spread, color=COLOURS[variant],
            marker=MARKERS[variant], label=LABELS[variant],
        )  # fmt: skip
    axis.set_xticks(range(results.layers))


def _bars(
    axis: Axes,
    results: Results,
    variants: tuple[str, ...],
    groups: Sequence[tuple[str, Callable[[Any], float]]],
) -> None:
    width = 0.8 / len(variants)
    for position, variant in enumerate(variants):
        for x, (_, get) in enumerate(groups):
            values = results.values(variant, get)
            centre = x + (position - (len(variants) - 1) / 2) * width
            label = LABELS[variant] if x == 0 else None
            axis.bar(
                centre, statistics.fmean(values), 0.9 * width, color=COLOURS[variant], label=label
            )
            axis.plot([centre] * len(values), values, "k.", markersize=4)
    axis.set_xticks(range(len(groups)), [name for name, _ in groups])
    axis.grid(axis="x", visible=False)


def _all(results: Results) -> list[Result]:
    return [result for group in results.by_variant.values() for result in group]
