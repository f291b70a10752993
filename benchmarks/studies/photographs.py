# SPDX-License-Identifier: Apache-2.0
"""Whether what PRe keeps of photographs can be used from few examples, as with the demo's digits.

    python -m benchmarks.studies.photographs --workers 2    # 20 runs, each with 8 lessons

A sweep as `prereg sweep` runs it, over scenes of crops of photographs (photo_scenes.py). A run that
has ended is not run again. What has ended is copied to benchmarks/results/photographs/.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.common.report import RESULTS
from benchmarks.studies.demo_run import begin_from, keep_sweep
from benchmarks.studies.photo_scenes import PHOTOGRAPHS, PhotoConfig
from prereg_kernels.cli.demo import load_sweep, run_sweep
from prereg_kernels.demo.sweep.sweep import SweepConfig

KEPT = RESULTS / "photographs"
FIRST_SEED = 400  # no other study has it


def sweep_config(seeds: int = 5) -> SweepConfig:
    """The demo's sweep with photographs, as far as its larger weight and its control."""
    sweep = load_sweep("scenes")
    run = replace(sweep.experiment.run, scenes=PhotoConfig())
    experiment = replace(sweep.experiment, run=run, seeds=seeds, first_seed=FIRST_SEED)
    return SweepConfig(
        experiment,
        weights=(5.0,),
        anchors=("other_scene_pre_projector",),
        transfer=True,
    )


def draw_scenes(path: Path, count: int = 8) -> None:
    """Scenes of both splits, a row each, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for row, split in enumerate(PHOTOGRAPHS):
        for i, image in enumerate(PhotoConfig().open(split).batch(range(count)).images):
            axis = figure.add_subplot(2, count, row * count + i + 1)
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_ylabel(f"{split}, {len(PHOTOGRAPHS[split])} photographs")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep-photographs"))
    arguments = parser.parse_args()
    console = Console()
    if not arguments.out.exists() and KEPT.exists():
        begin_from(KEPT, arguments.out)
    try:
        devices = ["cpu"] * arguments.workers
        _, text = run_sweep(sweep_config(arguments.seeds), arguments.out, devices, console)
        console.print(text, highlight=False, markup=False)
    finally:
        keep_sweep(arguments.out, KEPT)


if __name__ == "__main__":
    main()
