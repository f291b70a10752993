# SPDX-License-Identifier: Apache-2.0
"""The commands `prereg demo` and `prereg sweep`: from arguments to what is run and printed."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prereg_kernels._util.files import printable
from prereg_kernels._util.settings import require_count, shown
from prereg_kernels._util.settings_file import from_dict, load_config, read_yaml, to_dict
from prereg_kernels.cli.settings import override, show
from prereg_kernels.demo.config import RunConfig
from prereg_kernels.demo.evaluation import evaluate
from prereg_kernels.demo.experiment.cost import measure_cost, step_seconds
from prereg_kernels.demo.experiment.experiment import (
    ExperimentConfig,
    open_experiment,
    run_unit,
    steps_left,
    units,
)
from prereg_kernels.demo.experiment.report import write_report
from prereg_kernels.demo.loop import train as train_run
from prereg_kernels.demo.model.tower import trained_tower
from prereg_kernels.demo.runs.processes import check_one_process
from prereg_kernels.demo.runs.workers import run_units
from prereg_kernels.demo.sweep.report import write_sweep
from prereg_kernels.demo.sweep.sweep import SweepConfig, check_sweep, open_sweep
from prereg_kernels.demo.sweep.sweep import run_unit as run_sweep_unit
from prereg_kernels.demo.sweep.sweep import steps_left as sweep_steps_left
from prereg_kernels.demo.sweep.sweep import units as sweep_units


def demo(arguments: argparse.Namespace, flags: Sequence[str], console: Console) -> None:
    """The command `prereg demo`, with flags of settings."""
    check_one_process()
    if arguments.config is None:
        arguments.preset = arguments.preset or "scenes"
        _experiment(arguments, flags, console)
        return
    for name in ("seeds", "steps", "weight", "workers"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name}: goes with --preset; with --config, set it in the file")
    _single(arguments, flags, console)


def sweep(arguments: argparse.Namespace, flags: Sequence[str], console: Console) -> None:
    """The command `prereg sweep`, with flags of settings."""
    check_one_process()
    settings = override(load_sweep(arguments.preset), flags)
    if arguments.settings:
        show(settings, "sweep")
        return
    experiment = _with_overrides(settings.experiment, arguments)
    devices = _devices(experiment.device, arguments)
    settings = replace(settings, experiment=replace(experiment, device=_kind(devices)))
    out = arguments.out or Path("runs") / f"sweep-{Path(arguments.preset).stem}"
    if arguments.report:
        check_sweep(settings, out)
        path, text = write_sweep(settings, out, devices[0])
    else:
        path, text = run_sweep(settings, out, devices, console, fresh=arguments.fresh)
    console.print(text, highlight=False, markup=False)
    console.print(f"results: {printable(path)}", markup=False)


def run_sweep(
    settings: SweepConfig,
    out: Path,
    devices: Sequence[str],
    console: Console,
    *,
    fresh: bool = False,
) -> tuple[Path, str]:
    """Run what is missing of a sweep, a worker a device, and write its results.

    Returns:
        As `write_sweep`.
    """
    with open_sweep(settings, out, fresh):
        _tower(settings.experiment, out, devices[0], console)
        steps = sweep_steps_left(settings, out)
        _forecast(settings.experiment, out, steps, len(devices), console)
        run = partial(run_sweep_unit, settings)
        run_units(sweep_units(settings), run, out, devices, console, finished=not steps)
        return write_sweep(settings, out, devices[0])


def _single(arguments: argparse.Namespace, flags: Sequence[str], console: Console) -> None:
    settings = override(load_config(arguments.config, RunConfig), flags)
    if arguments.settings:
        show(settings, "demo")
        return
    out = arguments.out or Path("runs") / arguments.config.stem
    device = _usable(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = train_run(settings, out, resume=not arguments.fresh, device=device)
    test = settings.scenes.open("test", settings.seed)
    answers = evaluate(result.model, result.packer, test, list(settings.families))
    for family, accuracy in answers.accuracy.items():
        console.print(
            f"{family}: {accuracy:.1%} (always the commonest: {answers.majority[family]:.1%})"
        )
    console.print(
        f"LM loss {answers.lm_loss:.3f} nats; model in {printable(result.checkpoint)}", markup=False
    )


def _experiment(arguments: argparse.Namespace, flags: Sequence[str], console: Console) -> None:
    start = time.perf_counter()
    settings = _with_overrides(override(load_preset(arguments.preset), flags), arguments)
    if arguments.weight is not None:
        pre = replace(settings.run.pre, weight=arguments.weight)
        settings = replace(settings, run=replace(settings.run, pre=pre))
    if arguments.settings:
        show(settings, "demo")
        return
    devices = _devices(settings.device, arguments)
    settings = replace(settings, device=_kind(devices))
    out = arguments.out or Path("runs") / Path(arguments.preset).stem
    with open_experiment(settings, out, arguments.fresh):
        _tower(settings, out, devices[0], console)
        is_resumed = any(unit.directory(out).exists() for unit in units(settings))
        steps = steps_left(settings, out)
        _forecast(settings, out, steps, len(devices), console)
        run = partial(run_unit, settings)
        run_units(units(settings), run, out, devices, console, finished=not steps)
        with console.status("measuring what a step costs"):
            cost = measure_cost(settings, out)
        took = f"{(time.perf_counter() - start) / 60:.1f} min"
        took += ", beside what was there before" if is_resumed else ""
        page = write_report(settings, cost, took, out, console)
    console.print(f"report: {printable(page)}", markup=False)


def _tower(settings: ExperimentConfig, out: Path, device: str, console: Console) -> None:
    """Train the tower before any worker needs it."""
    torch.set_num_threads(1)  # at these widths a second thread costs more than it brings
    run = settings.run
    with console.status("the vision tower learns to see"):
        tower = trained_tower(run.model, run.scenes, run.tower, out / "cache", device=device)
    seen = ", ".join(f"{name} {share:.1%}" for name, share in tower.accuracy.items())
    console.print(f"vision tower ({tower.seconds:.0f} s): {seen}", highlight=False)


def _forecast(
    settings: ExperimentConfig, out: Path, steps: int, workers: int, console: Console
) -> None:
    """Say how long what is left will train, before it is begun."""
    if steps:
        hours = steps * step_seconds(settings, out) / workers / 3600
        minutes = max(round(60 * hours), 1)
        time_left = f"{hours:.1f} hours" if hours >= 1 else f"{minutes} minute{'s'[: minutes - 1]}"
        console.print(
            f"{steps:,} steps to train, about {time_left} with workers: {workers}. Measuring "
            "comes on top",
            highlight=False,
        )


def _devices(meant_for: str, arguments: argparse.Namespace) -> list[str]:
    """A device for each worker: those of `--device cuda` are dealt out over all GPUs."""
    if arguments.device is None and meant_for != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"--device: the preset is meant for {meant_for}, which is not here; expected a machine "
            "that has it, or --device cpu"
        )
    name = str(_usable(arguments.device or meant_for))
    pool = [name]
    if (arguments.device or meant_for) == "cuda":
        pool = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    default = len(os.sched_getaffinity(0)) if name == "cpu" else len(pool)
    workers = default if arguments.workers is None else arguments.workers
    require_count("--workers", workers, 1024)
    return [pool[i % len(pool)] for i in range(workers)]


def _kind(devices: list[str]) -> str:
    """What results are compared within: another GPU of the machine is the same."""
    return torch.device(devices[0]).type


def _usable(name: str) -> torch.device:
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} is not usable here: {error}") from None
    return device


def _with_overrides(settings: ExperimentConfig, arguments: argparse.Namespace) -> ExperimentConfig:
    run = settings.run
    if arguments.steps is not None:
        stages = (*run.stages[:-1], replace(run.stages[-1], steps=arguments.steps))
        run = replace(run, stages=stages)
    seeds = settings.seeds if arguments.seeds is None else arguments.seeds
    return replace(settings, run=run, seeds=seeds)


def load_preset(name: str) -> ExperimentConfig:
    """The experiment of that name, or of a YAML file.

    Raises:
        ValueError: no such preset, or as in `load_config`.
        OSError: the file cannot be read.
    """
    with as_file(_find("presets", name)) as path:
        return load_config(path, ExperimentConfig)


def load_sweep(name: str) -> SweepConfig:
    """The sweep of that name, or of a YAML file, which names its experiment as `preset` and gives
    `seeds`, `first_seed` and, under `experiment`, other settings of its own.

    Raises:
        ValueError: no such preset, or as in `load_config`.
        OSError: the file cannot be read.
    """
    with as_file(_find("sweeps", name)) as path:
        values = read_yaml(path)
        try:
            if not isinstance(values, dict):
                raise ValueError(f"expected a mapping, got {shown(values)}")
            if not isinstance(values.get("preset"), str):
                raise ValueError(
                    f"preset: expected a preset's name or a YAML file, got "
                    f"{shown(values.get('preset'))}"
                )
            preset = to_dict(load_preset(values.pop("preset")))
            experiment = _merged(preset, values.pop("experiment", {}))
            for name in ("seeds", "first_seed"):
                experiment[name] = values.pop(name, experiment[name])
            return from_dict(SweepConfig, {"experiment": experiment, **values})
        except ValueError as error:
            raise ValueError(f"{printable(path)}: {error}") from None


def _merged(settings: dict[str, Any], changes: Any) -> dict[str, Any]:
    """Settings with others in their place, mapping by mapping."""
    if not isinstance(changes, dict):
        raise ValueError(f"experiment: expected a mapping, got {shown(changes)}")
    merged = dict(settings)
    for name, value in changes.items():
        inside = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if inside else value
    return merged


def _find(folder: str, name: str) -> Any:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    directory = files("prereg_kernels.demo") / folder
    known = sorted(item.name.removesuffix(".yaml") for item in directory.iterdir())
    if name not in known:
        raise ValueError(
            f"--preset: expected one of {', '.join(known)}, or a YAML file; got {name}"
        )
    return directory / f"{name}.yaml"
