# SPDX-License-Identifier: Apache-2.0
"""The demo's run with other settings, and studies of many such runs, which go on where they
stopped."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.report import write_json

BASELINE = "baseline"


def demo_run(seed: int, pre: Mapping[str, Any] | None, steps: int | None = None) -> Any:
    """Its settings, without a checkpoint on the way.

    Args:
        pre: settings of PRe that differ from the demo's; None: the baseline, without PRe.
        steps: of the last stage; None: its own.
    """
    from prereg_kernels._util.settings_file import load_config
    from prereg_kernels.demo.experiment.experiment import ExperimentConfig, Unit, run_config

    preset = files("prereg_kernels.demo") / "presets" / "scenes.yaml"
    config = load_config(Path(str(preset)), ExperimentConfig)
    run = run_config(config, Unit(seed, BASELINE if pre is None else "pre"))
    run = replace(run, pre=replace(run.pre, **(pre or {})), checkpoint_every=10**6)
    if steps is not None:
        run = replace(run, stages=(*run.stages[:-1], replace(run.stages[-1], steps=steps)))
    return run


def prepare(run: Any, cache: str) -> None:
    """Train the tower of a run, if it is not in `cache`."""
    from prereg_kernels.demo.model.tower import trained_tower

    torch.set_num_threads(1)
    trained_tower(run.model, run.scenes, run.tower, cache)


def keep_sweep(directory: Path, kept: Path) -> None:
    """Copy a sweep's settings and each finished run's result, which says where it was made."""
    for path in (directory / "sweep.json", *directory.glob("seed-*/*/result.json")):
        copy = kept / path.relative_to(directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def begin_from(kept: Path, directory: Path) -> None:
    """Make a new directory in which a sweep goes on with what is missing of `kept`."""
    from prereg_kernels._util.directories import held

    with held(directory, "sweep", (), lambda _: False, lambda _: False):
        shutil.copytree(kept, directory, dirs_exist_ok=True)


Row = dict[str, Any]


def run_missing(
    documentation: str | None,
    seeds: range,
    out: Path,
    todo: Callable[[range], Iterable[tuple[str, int]]],
    prepared: Callable[[], Iterable[Any]],
    measure: Callable[[str, int, int | None, str], Row],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """The command line of a study of many runs; every run is in its file as soon as it ends.

    Args:
        documentation: the module's.
        seeds: all of them.
        out: the file, {"runs": rows}, each with its "variant" and "seed".
        todo: the (variant, seed) of some seeds.
        prepared: the runs whose towers are trained first.
        measure: a variant's row for a seed, given the last stage's steps and the towers' folder.
        table: what is printed, of what the file holds.
    """
    parser = argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=len(seeds))
    parser.add_argument("--steps", type=int, help="of the last stage; by default the demo's")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--cache", default="runs/scenes/cache", help="where trained towers are")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    arguments = parser.parse_args()
    stored: dict[str, Any] = {"runs": []}
    if arguments.table or arguments.out.exists():
        stored = json.loads(arguments.out.read_text())
    if arguments.table:
        return print(table(stored))
    done = {(row["variant"], row["seed"]) for row in stored["runs"]}
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context) as pool:
        towers = [pool.submit(prepare, run, arguments.cache) for run in prepared()]
        for tower in towers:
            tower.result()
        runs = [
            pool.submit(measure, variant, seed, arguments.steps, arguments.cache)
            for variant, seed in todo(seeds[: arguments.seeds])
            if (variant, seed) not in done
        ]
        for run in as_completed(runs):
            stored["runs"].append(run.result())
            write_json(stored, arguments.out)
    print(table(stored))
