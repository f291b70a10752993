# SPDX-License-Identifier: Apache-2.0
"""The experiment's pictures, as PNG files. They only read results; nothing is computed here."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from prereg_kernels.checkup.measures.measure import STRUCTURE
from prereg_kernels.checkup.report.pictures import Drawing, Picture, draw_all
from prereg_kernels.checkup.report.style import curve, legend, mark_layer, panels
from prereg_kernels.checkup.words import over_depth
from prereg_kernels.demo.config import TRAINED
from prereg_kernels.demo.data.questions import COMMON_FAMILIES, questions
from prereg_kernels.demo.data.scenes import ATTRIBUTES, PROPERTIES
from prereg_kernels.demo.experiment.experiment import VARIANTS, ExperimentConfig
from prereg_kernels.demo.experiment.summary import (
    Result,
    Results,
    at,
    learned,
    unasked,
)
from prereg_kernels.demo.metrics import read_metrics
from prereg_kernels.demo.training_checkup import read_checkups

LABELS = {"baseline": "baseline", "pre": "PRe", "other_scene": "control: another scene's target"}
COLOURS = {"baseline": "first", "pre": "second", "other_scene": "third"}
"""Their names in the themes."""
MARKERS = {"baseline": "s", "pre": "o", "other_scene": "^"}
COLUMNS = 4
Colours = Mapping[str, str]


def plot_all(
    results: Results, config: ExperimentConfig, out: Path, directory: Path
) -> dict[str, Picture]:
    """Draw every picture into `directory`; {name: what a page shows of it}."""
    layer = config.run.pre.layer

    def draw(colours: Colours) -> Iterator[tuple[str, Drawing]]:
        yield "probes", probes(results, layer, colours)
        yield "answers", answers(results, colours)
        yield "transfer", transfer(results, colours)
        yield "structure", structure(results, layer, colours)
        yield "training", training(results, out, colours)
        yield "scenes", scenes(config)
        over_training = progress(results, out, layer, colours)
        if over_training is not None:
            yield "progress", over_training

    return draw_all(draw, directory)


def probes(results: Results, layer: int, colours: Colours) -> Drawing:
    """Probe accuracy over depth, a panel for each property, on one scale."""
    figure, axes = panels(len(PROPERTIES), size=(15, 3.1))
    words = []
    for axis, name in zip(axes, PROPERTIES, strict=True):
        curves = _over_depth(axis, results, at("probe", name), layer, colours, scale=100)
        axis.set_title(f"{name} ({'asked' if name == 'digit' else 'never asked'})")
        words.append(_in_words(f"Probe of {name}, over the layers", curves, layer, "%"))
    lowest = min(axis.get_ylim()[0] for axis in axes)
    for axis in axes:
        axis.set_ylim(lowest, 100)
    axes[0].set_ylabel("linear probe, test accuracy (%)")
    legend(figure, axes[0])
    return Drawing(figure, words, axes, _key(VARIANTS))


def structure(results: Results, layer: int, colours: Colours) -> Drawing:
    """The measures of patch structure over depth."""
    measures = [m for m in results.measures() if m.group == STRUCTURE]
    rows = -(-len(measures) // COLUMNS)
    figure, axes = panels(len(measures), size=(14, 2.8 * rows), columns=COLUMNS)
    unit = ""
    words = []
    for i, (axis, measure) in enumerate(zip(axes, measures, strict=True)):
        get = at(measure.group, measure.name)
        curves = _over_depth(axis, results, get, layer, colours, measure.scale)
        axis.set_title(measure.name)
        if i % COLUMNS == 0 or measure.unit != unit:
            axis.set_ylabel(measure.unit)
        unit = measure.unit
        what = f"{measure.name.capitalize()}, over the layers"
        words.append(_in_words(what, curves, layer, measure.unit))
    legend(figure, axes[0])
    return Drawing(figure, words, axes, _key(VARIANTS))


def answers(results: Results, colours: Colours) -> Drawing:
    """Accuracy per question family, a bar a variant, a dot a seed."""
    figure, [axis] = panels(1, size=(9, 3.4))
    families = [*results.families, "mean"]

    def get(family: str) -> Callable[[Result], float]:
        return lambda r: 100 * (r["mean_accuracy"] if family == "mean" else r["accuracy"][family])

    groups = [(family, get(family)) for family in families]
    levels = _bars(axis, results, VARIANTS, groups, colours)
    for x, family in enumerate(families[:-1]):
        level = 100 * statistics.fmean(r["majority"][family] for r in _all(results))
        _chance(axis, x, level, colours)
    axis.set_ylabel("right answers (%)")
    axis.set_ylim(0, 105)
    axis.set_title("answers by greedy generation; dots: seeds; dotted: always the commonest answer")
    legend(figure, axis)
    return Drawing(figure, [f"Right answers. {levels}"])


def transfer(results: Results, colours: Colours) -> Drawing:
    """Accuracy on the new question families, per way of learning them."""
    figure, [axis] = panels(1, size=(9, 3.4))

    def get(frozen: str, scenes: str) -> Callable[[Result], float]:
        return lambda r: 100 * learned(frozen, scenes)(r)

    groups = [(TRAINED[frozen], get(frozen, scenes)) for frozen, scenes in results.transfers]
    levels = _bars(axis, results, VARIANTS, groups, colours)
    for x, (frozen, scenes) in enumerate(results.transfers):
        _chance(axis, x, 100 * results.commonest(frozen, scenes), colours)
    families, scenes = ", ".join(results.new_families), results.transfers[0][1]
    axis.set_ylabel("right answers (%)")
    axis.set_ylim(0, 105)
    axis.set_title(
        f"new kinds of question ({families}), learned afterwards from {scenes} scenes\n"
        "dots: seeds; dotted: always the commonest answer"
    )
    legend(figure, axis)
    return Drawing(figure, [f"Right answers to new kinds of question, {families}. {levels}"])


def effect(results: Results, layer: int, colours: Colours) -> Drawing:
    """Baseline and PRe alone: what probes read at a layer, and what was learned afterwards."""
    figure, axes = panels(2, size=(11, 3.6))
    variants = ("baseline", "pre")

    def read(name: str) -> Callable[[Result], float]:
        return lambda r: 100 * r["probe"][name][layer]

    kept = _bars(axes[0], results, variants, [(n, read(n)) for n in ATTRIBUTES], colours)
    for x, name in enumerate(ATTRIBUTES):
        _chance(axes[0], x, 100 * results.values("baseline", at("probe", name, 0))[0], colours)
    axes[0].set_title(f"what no question asks, at layer {layer}\n(dotted: at the LLM's input)")
    axes[0].set_ylabel("linear probe, test accuracy (%)")
    axes[0].set_ylim(0, 105)
    frozen, scenes = results.transfers[0]

    def answer(name: str) -> Callable[[Result], float]:
        return lambda r: 100 * r["transfer"][frozen][scenes][name]["accuracy"]

    asked = results.new_families
    told = _bars(axes[1], results, variants, [(n, answer(n)) for n in asked], colours)
    for x, name in enumerate(asked):
        get = at("transfer", frozen, scenes, name, "majority")
        _chance(axes[1], x, 100 * results.values("baseline", get)[0], colours)
    axes[1].set_title(f"new questions, from {scenes} scenes\n(dotted: always the commonest answer)")
    axes[1].set_xlim(-1.5, len(asked) + 0.5)  # bars about as wide as on the left
    axes[1].set_ylabel("right answers (%)")
    axes[1].set_ylim(0, 100)
    legend(figure, axes[0])
    return Drawing(figure, [f"Probes at layer {layer}. {kept}", f"New kinds of question. {told}"])


def training(results: Results, out: Path, colours: Colours) -> Drawing:
    """Both losses over the steps, a thin line a seed, smoothed over 10 steps."""
    figure, axes = panels(2, size=(11, 3.2))
    last: dict[str, dict[str, list[float]]] = {"lm_loss": {}, "pre_loss": {}}
    for variant in VARIANTS:
        for position, result in enumerate(results.by_variant[variant]):
            rows = read_metrics(out / f"seed-{result['seed']}" / variant)
            for axis, (key, ends) in zip(axes, last.items(), strict=True):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if len(points) < 10:
                    continue
                steps, values = np.array(points).T
                smooth = np.convolve(values, np.ones(10) / 10, mode="valid")
                label = LABELS[variant] if position == 0 else None
                axis.plot(
                    steps[9:], smooth, color=colours[COLOURS[variant]], linewidth=1, label=label,
                    linestyle="--" if variant == "other_scene" else "-",  # over the baseline's
                )  # fmt: skip
                ends.setdefault(LABELS[variant], []).append(smooth[-1])
    names = ("Language-model loss", "PRe loss")
    for axis, name, unit in zip(
        axes, names, ("L_LM (nats per answer)", "L_PRe (negative cosine)"), strict=True
    ):
        axis.set(xlabel="step", ylabel=unit, title=f"{name}, a line for each seed")
    legend(figure, axes[0])
    words = []
    for name, ends in zip(names, last.values(), strict=True):
        levels = [f"{label} {statistics.fmean(values):.3f}" for label, values in ends.items()]
        words.append(f"{name}, at the end: {'; '.join(levels) or 'too few steps'}.")
    return Drawing(figure, words, axes, _key(VARIANTS))


def progress(results: Results, out: Path, layer: int, colours: Colours) -> Drawing | None:
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
    last: list[list[str]] = [[] for _ in shown]
    for variant, seeds in checkups.items():
        if not seeds:
            continue
        steps = [row["step"] for row in seeds[0]]
        colour = colours[COLOURS[variant]]
        for axis, (title, get), ends in zip(axes, shown, last, strict=True):
            lines = 100 * np.array([[get(row) for row in rows] for rows in seeds])
            mean = lines.mean(axis=0)
            axis.plot(
                steps, mean, color=colour, marker=MARKERS[variant], markersize=4,
                label=LABELS[variant],
            )  # fmt: skip
            for line in lines if len(lines) > 1 else ():
                axis.plot(steps, line, color=colour, linewidth=0.6, alpha=0.5)
            axis.set(title=title, xlabel="step")
            ends.append(f"{LABELS[variant]} {mean[0]:.1f}% to {mean[-1]:.1f}%")
    axes[0].set_ylabel("right (%)")
    legend(figure, axes[0])
    words = [
        f"{title}, from the first checkup to the last: {'; '.join(ends)}."
        for (title, _), ends in zip(shown, last, strict=True)
    ]
    return Drawing(figure, words, axes, _key(v for v in VARIANTS if checkups[v]))


def scenes(config: ExperimentConfig, count: int = 6) -> Drawing:
    """Test scenes, their object masks, a digit's attributes, and a question of each family."""
    figure, axes = panels(2 * count, size=(2.5 * count, 6.2), columns=count)
    test = config.run.scenes.open("test")
    told = []
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
        digits = ", ".join(str(thing.digit) for thing in scene.objects)
        told.append(f"digits {digits} ({'; '.join(lines)})")
        bottom.set_title("\n".join(lines), fontsize=8, loc="left")
        for axis in (top, bottom):
            axis.set_axis_off()
    figure.suptitle(
        "above: scenes, and the attributes of the digit in the frame; below: the pixels of each "
        "digit, and a question of each kind with its answer", fontsize=10,
    )  # fmt: skip
    return Drawing(figure, [f"Test scenes and their object masks: {'. '.join(told)}."])


def _over_depth(
    axis: Axes,
    results: Results,
    get: Callable[[Result], list[float]],
    layer: int,
    colours: Colours,
    scale: float = 1,
) -> dict[str, list[float]]:
    """Draws, and returns, each variant's mean over seeds, by layer."""
    means = {}
    for variant in VARIANTS:
        lines = scale * np.array([get(result) for result in results.by_variant[variant]])
        mean = lines.mean(axis=0)
        spread = lines.std(axis=0, ddof=1) if len(lines) > 1 else np.full_like(mean, np.nan)
        curve(
            axis, mean, mean - spread, mean + spread, color=colours[COLOURS[variant]],
            marker=MARKERS[variant], label=LABELS[variant],
        )  # fmt: skip
        means[LABELS[variant]] = (mean / scale).tolist()
    band: dict[str, Any] = {"color": colours["soft"], "alpha": 0.2}
    axis.fill_between([], [], [], **band, label="band: ± the standard deviation over seeds")
    line: dict[str, Any] = {"color": colours["ink"], "linestyle": ":", "linewidth": 1}
    mark_layer(axis, layer, **line, zorder=0, label="the layer with PRe")
    axis.set_xticks(range(results.layers))
    return means


def _in_words(what: str, curves: Mapping[str, Sequence[float]], layer: int, unit: str) -> str:
    parts = [f"{name}: {over_depth(values, layer, unit)}" for name, values in curves.items()]
    return f"{what}. {'. '.join(parts)}."


def _bars(
    axis: Axes,
    results: Results,
    variants: Collection[str],
    groups: Sequence[tuple[str, Callable[[Any], float]]],
    colours: Colours,
) -> str:
    """Draws the groups' bars, and returns their heights in words."""
    width = 0.8 / len(variants)
    told: list[list[str]] = [[] for _ in groups]
    for position, variant in enumerate(variants):
        for x, (_, get) in enumerate(groups):
            values = results.values(variant, get)
            mean = statistics.fmean(values)
            centre = x + (position - (len(variants) - 1) / 2) * width
            label = LABELS[variant] if x == 0 else None
            colour = colours[COLOURS[variant]]
            axis.bar(centre, mean, 0.9 * width, color=colour, label=label)
            # Side by side: two seeds may have the same value
            beside = [
                centre + 0.12 * width * (i - (len(values) - 1) / 2) for i in range(len(values))
            ]
            axis.plot(beside, values, ".", color=colours["ink"], markersize=4)
            told[x].append(f"{LABELS[variant]} {mean:.1f}%")
    axis.set_xticks(range(len(groups)), [name for name, _ in groups])
    axis.grid(axis="x", visible=False)
    heights = [f"{name}: {', '.join(t)}." for (name, _), t in zip(groups, told, strict=True)]
    return " ".join(heights)


def _chance(axis: Axes, x: int, level: float, colours: Colours) -> None:
    """What always the commonest answer is worth, across a group of bars."""
    axis.hlines(level, x - 0.45, x + 0.45, color=colours["ink"], linestyle=":", linewidth=1.2)


def _key(variants: Iterable[str]) -> dict[str, str]:
    return {LABELS[variant]: COLOURS[variant] for variant in variants}


def _all(results: Results) -> list[Result]:
    return [result for group in results.by_variant.values() for result in group]
