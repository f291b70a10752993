# SPDX-License-Identifier: Apache-2.0
"""A picture: memory over a step, through the blocks and back, with PRe's part in it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from prereg_kernels.estimate.estimate import Estimate
from prereg_kernels.estimate.memory import peak

COLOURS = {
    "weights": "#8a8f98", "optimizer": "#b9bec7", "gradients": "#e0b04c",
    "activations": "#6aa6d8", "scratch": "#c9def0", "pre": "#d1495b",
}  # fmt: skip
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
}  # fmt: skip


def draw(found: Estimate, path: Path) -> None:
    """Write the picture; its ending, .png or .svg, says which kind."""
    moments = found.moments["fused"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        steps = range(len(moments))
        heights = [[m.bytes.get(kind, 0.0) / 2**30 for m in moments] for kind in COLOURS]
        axes.stackplot(
            steps, *heights, labels=["PRe" if k == "pre" else k for k in COLOURS],
            colors=list(COLOURS.values()), step="mid",
        )  # fmt: skip
        eager = [m.total / 2**30 for m in found.moments["eager"]]
        places = {
            (m.place, m.phase): step for step, m in enumerate(moments)
        }  # eager PRe has no place of its own
        at = [
            (places[m.place, m.phase], total)
            for m, total in zip(found.moments["eager"], eager, strict=True)
        ]
        axes.plot(*zip(*at, strict=True), color="black", linewidth=0.8, label="with eager PRe")
        highest = peak(moments)
        axes.axhline(highest.total / 2**30, color="black", linewidth=0.5, linestyle=":")
        marks = {"loss": "loss"} | {"PRe": f"PRe, layer {found.head.layer}"}
        ticks = {
            step: marks[m.place] for step, m in enumerate(moments)
            if m.place in marks and (m.place != "loss" or m.phase == "loss")
        }  # fmt: skip
        for step, m in enumerate(moments):
            if m.layer == 1 and m.place != "PRe":
                ticks[step] = "layer 1"
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xlim(0, len(moments) - 1)
        axes.set_xlabel("forward, then backward")
        axes.set_ylabel(f"GiB of {found.settings.holder}")
        axes.set_title(
            f"{found.structure.name}, {found.settings.gpus} {found.settings.gpu}: peak "
            f"{highest.total / 2**30:.1f} GiB", loc="left",
        )  # fmt: skip
        axes.legend(loc="upper left", frameon=False, ncols=4)
        axes.set_ylim(0, 1.25 * max(m.total for m in moments) / 2**30)
        figure.savefig(path, dpi=160)
