# SPDX-License-Identifier: Apache-2.0
"""A picture: memory over a step, through the blocks and back, with PRe's part in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prereg_kernels.estimate.estimate import Estimate
from prereg_kernels.estimate.memory import Moment, peak
from prereg_kernels.estimate.report import size

COLOURS = {
    "pre": "#d1495b", "weights": "#8a8f98", "optimizer": "#b9bec7", "gradients": "#e0b04c",
    "activations": "#6aa6d8", "scratch": "#c9def0",
}  # fmt: skip
"""From the bottom upwards: thin parts on top of a slope come out as loose dashes."""
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
}  # fmt: skip
SHOWN = 0.02
"""Of the width, at least for PRe's own place, which is one of hundreds."""


def draw(found: Estimate, path: Path) -> None:
    """Write the picture; its ending, .png or .svg, says which kind."""
    moments = found.moments["fused"]
    highest = peak(moments)
    unit, name = (2**30, "GiB") if highest.total >= 2**30 else (2**20, "MiB")
    is_tap = np.array([m.place == "PRe" for m in moments])
    wide = max(1.0, SHOWN * len(moments))
    edges = np.concatenate(([0.0], np.where(is_tap, wide, 1.0).cumsum()))
    kinds = [_kinds(m) for m in moments]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.stackplot(
            edges, *(_steps([kind[name] / unit for kind in kinds]) for name in COLOURS),
            labels=["PRe" if kind == "pre" else kind for kind in COLOURS],
            colors=list(COLOURS.values()), step="post",
        )  # fmt: skip
        eager = [total / unit for total in _eager(moments, found.moments["eager"])]
        axes.step(
            edges, _steps(eager), color="black", linewidth=0.8, where="post", label="with eager PRe"
        )
        top = 1.25 * max(np.nanmax(eager), highest.total / unit)
        axes.axhline(highest.total / unit, color="black", linewidth=0.5, linestyle=":")
        axes.annotate(
            f"peak {size(highest.total)}", (edges[-1], highest.total / unit), (0, 2),
            textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
        _name_places(axes, moments, edges)
        if is_tap.any():
            place = int(is_tap.argmax())
            axes.annotate(
                f"PRe, layer {found.head.layer}: {size(moments[place].total)}",
                (edges[place : place + 2].mean(), moments[place].total / unit),
                (edges[-1], 0.72 * top), ha="right", fontsize=8, arrowprops={"arrowstyle": "->"},
            )  # fmt: skip
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(0, top)
        axes.set_xlabel("forward, then backward")
        axes.set_ylabel(f"{name} of {found.settings.holder}")
        machine = "a CPU" if found.settings.gpu == "cpu" else found.settings.gpu.upper()
        count = f"{found.settings.gpus} x " if found.settings.gpus > 1 else ""
        axes.set_title(f"{found.structure.name}, {count}{machine}", loc="left")
        axes.legend(loc="upper left", frameon=False, ncols=4)
        figure.savefig(path, dpi=160)


def _steps(values: Sequence[float]) -> list[float]:
    """A value for each edge: the last one holds to the end."""
    return [*values, values[-1]]


def _kinds(moment: Moment) -> dict[str, float]:
    """Its bytes; scratch is as much more, or less, as a CPU's process is found to take."""
    beyond = moment.bytes.get("correction", 0.0)
    kinds = {kind: moment.bytes.get(kind, 0.0) for kind in COLOURS}
    kinds["scratch"] = max(kinds["scratch"] + beyond, 0.0)
    return kinds


def _eager(moments: Sequence[Moment], eager: Sequence[Moment]) -> Iterator[float]:
    """The bytes of a step with eager PRe at the same places; NaN at PRe's, which it has not."""
    others = iter(eager)
    for moment in moments:
        yield nan if moment.place == "PRe" else sum(_kinds(next(others)).values())


def _name_places(axes: Axes, moments: Sequence[Moment], edges: np.ndarray) -> None:
    """The loss, and the first layer on both ways if there is room beside the loss."""
    middles = (edges[:-1] + edges[1:]) / 2
    loss = next(i for i, m in enumerate(moments) if m.phase == "loss")
    ticks = {loss: "loss"}
    for i, moment in enumerate(moments):
        is_far = abs(middles[i] - middles[loss]) > 0.1 * edges[-1]
        if moment.layer == 1 and moment.place != "PRe" and is_far:
            ticks[i] = "layer 1"
    axes.set_xticks(middles[list(ticks)], list(ticks.values()))
