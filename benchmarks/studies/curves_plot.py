# SPDX-License-Identifier: Apache-2.0
"""Plots the training curves of a run: `python -m benchmarks.studies.curves_plot FILE PICTURE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np


def plot(source: Path, picture: Path) -> None:
    """Smoothed curves above, their differences from the first run below; of the file alone."""
    from matplotlib.figure import Figure

    results = json.loads(source.read_text())
    window, curves = results["window"], results["curves"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex=True, squeeze=False)
    for column, (title, runs) in enumerate(curves.items()):
        first = next(iter(runs.values()))
        for name, values in runs.items():
            steps = np.arange(window, len(values) + 1)
            mean, base = (
                np.convolve(x, np.ones(window) / window, mode="valid") for x in (values, first)
            )
            width = 2.0 if name == "fused" else 1.0
            axes[0, column].plot(steps, mean, label=name, linewidth=width)
            if values is not first:
                axes[1, column].plot(steps, mean - base, label=name, linewidth=width)
        axes[0, column].set_title(f"{title}, mean of {window} steps")
        axes[1, column].set_title(f"difference from {next(iter(runs))}")
        axes[1, column].axhline(0, color="grey", linewidth=0.5)
        axes[1, column].set_xlabel("step")
        axes[0, column].legend()
    figure.savefig(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path)
    plot(*vars(parser.parse_args()).values())
