# SPDX-License-Identifier: Apache-2.0
"""What PRe costs on this machine: the time of a training step, and peak memory.

Times are taken in one process, baseline and PRe in turn, so that both meet the same machine. Peaks
are taken in a process each, whose high-water mark knows no other model; that of the baseline goes
on with the times, as a process takes seconds to start.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable, read_json, write_whole
from prereg_kernels.demo.experiment.experiment import ExperimentConfig, Unit, run_config
from prereg_kernels.demo.runs.interrupts import sigint_ignored
from prereg_kernels.demo.runs.memory import peak_memory

_WARMUP_STEPS, _MEMORY_STEPS = 3, 6


def measure_cost(config: ExperimentConfig, out: Path) -> dict[str, Any]:
    """Median seconds of a step and peak memory in bytes, without and with PRe, one thread.

    On a GPU the memory is what torch allocates there.

    Args:
        out: the experiment's directory, whose cached tower is used; cost.json there keeps the
            result, which is not measured again.
    """
    path = out / "cost.json"
    if path.exists():
        return _read(path)
    with_pre_peak = _in_fresh_process(_peak_memory, config, out, "pre")
    baseline_peak, times = _in_fresh_process(_peak_and_times, config, out)
    ratios = [with_pre / without for without, with_pre in zip(*times.values(), strict=True)]
    cost = {
        "step_seconds": {name: statistics.median(values) for name, values in times.items()},
        "step_ratio": statistics.median(ratios),
        "step_ratio_error": statistics.stdev(ratios) / math.sqrt(len(ratios)),
        "steps": config.cost_steps,
        "device": config.device,
        "peak_bytes": {"baseline": baseline_peak, "pre": with_pre_peak},
    }
    write_whole(path, json.dumps(cost, indent=1))
    return cost


def step_seconds(config: ExperimentConfig, out: Path) -> float:
    """The median of a few training steps with PRe here and now, in seconds, in this process."""
    stepper = _stepper(config, out, "pre")
    return statistics.median([stepper(step) for step in range(_WARMUP_STEPS + 3)][_WARMUP_STEPS:])


def _read(path: Path) -> dict[str, Any]:
    cost = read_json(path)
    names = {"step_seconds", "step_ratio", "step_ratio_error", "steps", "device", "peak_bytes"}
    if not isinstance(cost, dict) or not names <= cost.keys():
        raise ValueError(f"{printable(path)}: expected costs; without it, they are measured again")
    return cost


def _in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with sigint_ignored():
            future = pool.submit(function, *arguments)
        return future.result()


def _peak_and_times(config: ExperimentConfig, out: Path) -> tuple[int, dict[str, list[float]]]:
    """The baseline's peak, before there is another model; then what steps of both take."""
    return _peak_memory(config, out, "baseline"), _step_times(config, out)


def _step_times(config: ExperimentConfig, out: Path) -> dict[str, list[float]]:
    steppers = {variant: _stepper(config, out, variant) for variant in ("baseline", "pre")}
    times: dict[str, list[float]] = {variant: [] for variant in steppers}
    for step in range(_WARMUP_STEPS + config.cost_steps):
        for variant, stepper in steppers.items():
            seconds = stepper(step)
            if step >= _WARMUP_STEPS:
                times[variant].append(seconds)
    return times


def _peak_memory(config: ExperimentConfig, out: Path, variant: str) -> int:
    stepper = _stepper(config, out, variant)
    for step in range(_MEMORY_STEPS):
        stepper(step)
    if config.device == "cpu":
        return peak_memory()
    import torch

    return torch.cuda.max_memory_allocated()


def _stepper(config: ExperimentConfig, out: Path, variant: str) -> Callable[[int], float]:
    """A function that does training step i of the last stage with PRe, and returns its seconds."""
    import torch

    from prereg_kernels.demo.loop import Stepper

    torch.set_num_threads(1)
    run = run_config(config, Unit(0, variant))
    stages = zip(run.stages, config.run.stages, strict=True)  # the baseline's have no PRe
    measured = [mine for mine, with_pre in stages if with_pre.pre][-1]
    stepper = Stepper(replace(run, stages=(measured,)), out / "cache", config.device)
    return stepper.timed_step
